// Vectors of floats on the supported processors, and functions that work on each lane.

#pragma once

#include <cstdint>

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX2__) && defined(__FMA__)
#define LANES 8
#else
#error "needs AVX2 and FMA"
#endif

#include <immintrin.h>

namespace {

typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef int32_t Integers __attribute__((vector_size(4 * LANES)));
typedef float Anywhere __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

inline Vector load(const float* from) { return *reinterpret_cast<const Anywhere*>(from); }
inline void store(float* to, Vector value) { *reinterpret_cast<Anywhere*>(to) = value; }
inline Vector all(float value) { return value - Vector{}; }
inline Integers lanes() {
#if LANES == 16
    return Integers{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#else
    return Integers{0, 1, 2, 3, 4, 5, 6, 7};
#endif
}

// The compiler turns these into a comparison and a choice, or works byte by byte.
#if LANES == 16
inline Vector larger(Vector a, Vector b) { return (Vector)_mm512_max_ps((__m512)a, (__m512)b); }
inline Vector smaller(Vector a, Vector b) { return (Vector)_mm512_min_ps((__m512)a, (__m512)b); }
inline Integers widen(const uint8_t* from) {
    return (Integers)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
#else
inline Vector larger(Vector a, Vector b) { return (Vector)_mm256_max_ps((__m256)a, (__m256)b); }
inline Vector smaller(Vector a, Vector b) { return (Vector)_mm256_min_ps((__m256)a, (__m256)b); }
inline Integers widen(const uint8_t* from) {
    return (Integers)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
}
#endif

template <class Combine>
inline float reduce(Vector v, Combine combine) {
#if LANES == 16
    v = combine(v, __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
    v = combine(v, __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));
    v = combine(v, __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));
    v = combine(v, __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14));
#else
    v = combine(v, __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3));
    v = combine(v, __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5));
    v = combine(v, __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6));
#endif
    return v[0];
}
inline float sum(Vector v) {
    return reduce(v, [](Vector a, Vector b) { return a + b; });
}

// The coefficients start with that of the highest power.
template <int N>
inline Vector polynomial(Vector x, const float (&coefficients)[N]) {
    Vector p = all(coefficients[0]);
#pragma GCC unroll 16
    for (int i = 1; i < N; i++) p = p * x + coefficients[i];
    return p;
}

// 2^x, with a relative error of 1e-7.
inline Vector power_of_two(Vector x) {
    x = smaller(larger(x, all(-126.0f)), all(126.0f));
    const float round = 12582912.0f;  // 1.5 * 2^23: adding it leaves an integer in the lowest bits
    const Vector rounded = x + round, rest = x - (rounded - round);
    const Vector p = polynomial(rest, {0.0013276452f, 0.009675541f, 0.055507135f, 0.2402212f, 0.69314694f, 1.0f});
    return (Vector)((Integers)p + ((Integers)rounded << 23));
}

}  // namespace
