// Resizes pictures of eight bits to the same bytes as Pillow, on the vector units of a CPU; see resizing.py.
//
// Each pixel of the result is a weighted sum of its neighbours, first in a row and then in a column. All of it is in integers:
// weights are multiples of 2^-22, none is negative, and both sums are rounded to a byte. A pixel has four bytes; the last one
// is unused.

#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "vectors.h"

namespace {

constexpr int BITS = 22, HALF = BITS / 2;

typedef int16_t Words __attribute__((vector_size(4 * LANES)));
typedef int16_t WordsAnywhere __attribute__((vector_size(4 * LANES), aligned(2), may_alias));

// LANES / 2 pixels as words. For each two neighbours, both reds come first, then both greens, and so on.
inline Words pairs(const uint8_t* pixels) {
#if LANES == 16
    const __m256i order = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15));
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(pixels));
    return (Words)_mm512_cvtepu8_epi16(_mm256_shuffle_epi8(bytes, order));
#else
    const __m128i order = _mm_setr_epi8(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15);
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(pixels));
    return (Words)_mm256_cvtepu8_epi16(_mm_shuffle_epi8(bytes, order));
#endif
}

// Multiplies each pair with its weights, and adds the two products.
inline Integers multiply(Words pairs, Words weights) {
#if LANES == 16
    return (Integers)_mm512_madd_epi16((__m512i)pairs, (__m512i)weights);
#else
    return (Integers)_mm256_madd_epi16((__m256i)pairs, (__m256i)weights);
#endif
}

// Integers of 0..255 to bytes.
inline void narrow(Integers values, uint8_t* to) {
#if LANES == 16
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8((__m512i)values));
#else
    const __m128i low = _mm256_castsi256_si128((__m256i)values), high = _mm256_extracti128_si256((__m256i)values, 1);
    const __m128i words = _mm_packus_epi32(low, high);
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packus_epi16(words, words));
#endif
}

inline Integers rounded(Integers sum) {
    sum = (sum + (1 << (BITS - 1))) >> BITS;
    return sum > 255 ? Integers{} + 255 : sum;
}

constexpr int TOGETHER = LANES / 4;

// So many rows are resized at once, because the weights of all columns do not fit into the nearest cache.
constexpr int ROWS = 4;

// TOGETHER pixels have their parts in groups of four lanes. Returns the sum of the parts of each.
inline Integers sums(const Integers (&v)[TOGETHER]) {
#if LANES == 16
#define LOW 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23
#define HIGH 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31
#define EVEN 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27
#define ODD 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31
    const Integers first = __builtin_shufflevector(v[0], v[1], LOW) + __builtin_shufflevector(v[0], v[1], HIGH);
    const Integers second = __builtin_shufflevector(v[2], v[3], LOW) + __builtin_shufflevector(v[2], v[3], HIGH);
    return __builtin_shufflevector(first, second, EVEN) + __builtin_shufflevector(first, second, ODD);
#else
    return __builtin_shufflevector(v[0], v[1], 0, 1, 2, 3, 8, 9, 10, 11) +
           __builtin_shufflevector(v[0], v[1], 4, 5, 6, 7, 12, 13, 14, 15);
#endif
}

// Memory that a thread keeps. New pages would take as long as the writing into them.
struct Room {
    uint8_t* memory = nullptr;
    size_t size = 0;

    uint8_t* of(size_t wanted) {
        if (wanted > size) {
            std::free(memory);
            memory = static_cast<uint8_t*>(std::malloc(size = wanted));
        }
        return memory;
    }
    ~Room() { std::free(memory); }
};
thread_local Room room;

}  // namespace

extern "C" {

// The number of neighbours across is a multiple of this.
int resize_neighbours() { return LANES / 2; }

// uint8[height, width, 4] -> uint8[new_height, new_width, 3]
//
// `first_across[i]` is the first neighbour of the result's column i. `across` has the weights from there on, as
// int16[new_width, 2, taps / 2, 4, 2]: the upper and the lower half of their bits, in pairs of neighbours, repeated for each
// byte of a pixel. `first_across[i] + taps` may be beyond the row, where weights are zero. A row of the result has
// `counts_down` neighbours. Their weights are whole, int32[new_height, taps].
void resize(const uint8_t* pixels, long height, long width, uint8_t* out, long new_height, long new_width,
            const int32_t* first_across, const int16_t* across, long taps_across, const int32_t* first_down,
            const int32_t* counts_down, const int32_t* down, long taps_down) {
    const long from = first_down[0], to = first_down[new_height - 1] + counts_down[new_height - 1];
    const long line = (4 * new_width + LANES - 1) / LANES * LANES, wide = 4 * (width + taps_across);
    uint8_t* rows = room.of((to - from) * line + ROWS * wide);
    uint8_t* last = rows + (to - from) * line;  // rows near the end, each followed by zeros
    std::memset(last, 0, ROWS * wide);
    for (long y = from; y < to; y += ROWS) {
        const uint8_t* row[ROWS];
        for (int r = 0; r < ROWS; r++) {
            const long at = y + r < to ? y + r : to - 1;
            row[r] = pixels + 4 * at * width;
            if (4 * ((at + 1) * width + taps_across) > 4 * height * width)
                row[r] = static_cast<uint8_t*>(std::memcpy(last + r * wide, row[r], 4 * width));
        }
        for (long start = 0; start < new_width; start += TOGETHER) {
            Integers parts[ROWS][TOGETHER];
            for (int p = 0; p < TOGETHER; p++) {
                const long x = start + p < new_width ? start + p : start;  // a row has room for more, but no weights
                const long neighbours = 4 * first_across[x];
                const int16_t* weights = across + 8 * x * taps_across;
                Integers upper[ROWS] = {}, lower[ROWS] = {};
                for (long i = 0; i < 4 * taps_across; i += 2 * LANES) {
                    const Words high = *reinterpret_cast<const WordsAnywhere*>(weights + i);
                    const Words low = *reinterpret_cast<const WordsAnywhere*>(weights + 4 * taps_across + i);
#pragma GCC unroll 4
                    for (int r = 0; r < ROWS; r++) {
                        const Words values = pairs(row[r] + neighbours + i);
                        upper[r] += multiply(values, high);
                        lower[r] += multiply(values, low);
                    }
                }
#pragma GCC unroll 4
                for (int r = 0; r < ROWS; r++) parts[r][p] = (upper[r] << HALF) + lower[r];
            }
            for (long r = 0; r < ROWS && y + r < to; r++)
                narrow(rounded(sums(parts[r])), rows + (y + r - from) * line + 4 * start);
        }
    }
    for (long y = 0; y < new_height; y++) {
        const uint8_t* neighbours = rows + (first_down[y] - from) * line;
        const int32_t* weights = down + y * taps_down;
        for (long i = 0; i < line; i += LANES) {
            Integers sum = {};
            for (long t = 0; t < counts_down[y]; t++) sum += widen(neighbours + t * line + i) * weights[t];
            uint8_t bytes[LANES], *to = out + 3 * (y * new_width + i / 4);
            narrow(rounded(sum), bytes);
            const long there = new_width - i / 4 < TOGETHER ? new_width - i / 4 : TOGETHER;
            for (long x = 0; x < there; x++) {
                uint16_t two;
                std::memcpy(&two, bytes + 4 * x, 2);
                std::memcpy(to + 3 * x, &two, 2);
                to[3 * x + 2] = bytes[4 * x + 2];
            }
        }
    }
}
}
