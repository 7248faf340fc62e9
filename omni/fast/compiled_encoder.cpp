// The encoders of modeling_vision.py and modeling_audio.py on the vector units of a CPU; compiled_encoder.py compiles and calls
// them. They differ in their stems: patches of a picture, or convolutions over the frames of a sound.
//
// An item's tokens are cut into tiles of at most T::TILE tokens. Everything in a block except attention works on one token
// at a time. So a tile goes from one attention to the next without leaving the processor's nearest caches:
//
//     stem + positions                                     embed
//     -> norm -> queries, keys, values                     project
//     == wait for all tiles of the item ==
//     -> attention -> output + x -> norm -> MLP + x        block
//     -> project for the next block, or the final norm
//
// Each thread encodes one item, whose values stay in the thread's own caches. If there are fewer items than threads, all
// threads work on the same item: each takes the next free tile, and they wait for each other once in each block.
//
// Shapes: n tokens, D width, F width of the MLP, h heads of d = D/h. The stream x of residual sums is always float32. Products
// read T: float, or bfloat16 with sums in float32. A matrix (O, K) is stored in panels [O/PANEL][K][PANEL], in bfloat16 as
// [O/PANEL][K/2][PANEL][2]. A product reads them from beginning to end. Zeros fill K up to whole panels.
//
// If the processor has matrix units (AMX), they compute products of bfloat16: 16 rows by 16 columns by 32 steps at once.

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "vectors.h"

namespace {

constexpr int ROWS = LANES == 16 ? 14 : 6;  // 28 of 32 registers, or 12 of 16, hold sums, 2 weights, 1 values
constexpr int PANEL = 2 * LANES;

long up(long value, long multiple) { return (value + multiple - 1) / multiple * multiple; }

// x (1 + erf(x / sqrt 2)) / 2; erf(x / sqrt 2) / x by a polynomial in x^2 on 0..limit^2, which -1..1 stands for.
template <int N>
inline Vector gelu(Vector x, float limit, const float (&coefficients)[N]) {
    const Vector clamped = smaller(larger(x, all(-limit)), all(limit));
    const Vector half = x * 0.5f, erf = clamped * polynomial(clamped * clamped * (2 / (limit * limit)) - 1.0f, coefficients);
    return half + half * erf;
}

// Transposes LANES rows of LANES values.
template <int K, int... L>
inline void exchange(Integers& a, Integers& b, std::integer_sequence<int, L...>) {
    const Integers first = __builtin_shufflevector(a, b, (L & K ? LANES + L - K : L)...);
    b = __builtin_shufflevector(a, b, (L & K ? LANES + L : L + K)...);
    a = first;
}
template <int K = 1>
inline void transpose(Integers (&rows)[LANES]) {
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) {
        if (!(i & K)) exchange<K>(rows[i], rows[i + K], std::make_integer_sequence<int, LANES>{});
    }
    if constexpr (2 * K < LANES) transpose<2 * K>(rows);
}

// --- Types that products read ----------------------------------------------------------------------------------------

struct Float {
    float value;
    static constexpr int PAIR = 1;  // neighbouring values of a row in a panel
    static constexpr int STEP = 1;  // a product reads a multiple of so many values of a row,
    static constexpr int UNIT = 1;  // and a multiple of so many rows; results of rows too many do not count
    static constexpr int TILE = 3 * ROWS;

    static Vector power_of_two(Vector x) { return ::power_of_two(x); }

    static Vector gelu(Vector x) {  // erf to 5e-7
        return ::gelu(x, 5.0f, {0.0012174416f, -0.0032265252f, 0.0034456353f, -0.0053711627f, 0.012820982f, -0.022328667f,
                                0.032804366f, -0.04653731f, 0.06288434f, -0.08088522f, 0.103041045f, -0.14059256f,
                                0.28272757f});
    }
};

inline void put(float* to, Vector values) { store(to, values); }
inline void put(Float* to, Vector values) { store(&to->value, values); }
inline void put(Float* to, float value) { to->value = value; }
inline void put(Float* to, Vector left, Vector right) {
    put(to, left);
    put(to + LANES, right);
}

// A row of a panel [K][PANEL]. A token's values are stored there.
inline void put_row(Float* panel, long row, Vector left, Vector right) {
    put(panel + row * PANEL, left);
    put(panel + row * PANEL + LANES, right);
}

// A column of a panel [PANEL][PANEL]. A token's keys are stored there.
inline void put_column(Float* panel, long column, Vector left, Vector right) {
    float values[PANEL];
    store(values, left);
    store(values + LANES, right);
    for (long k = 0; k < PANEL; k++) put(panel + k * PANEL + column, values[k]);
}

// LANES neighbouring columns of float[LANES, PANEL]; `left` and `right` are added to the rows.
inline void put_columns(Float* panel, long column, const float* from, Vector left, Vector right) {
    for (int half = 0; half < 2; half++, panel += LANES * PANEL) {
        Integers rows[LANES];
        for (int i = 0; i < LANES; i++) rows[i] = (Integers)(load(from + i * PANEL + half * LANES) + (half ? right : left));
        transpose(rows);
        for (int i = 0; i < LANES; i++) put(panel + i * PANEL + column, (Vector)rows[i]);
    }
}

template <int R>
inline void multiply(const Float* a, long stride, const Float* panel, long steps, Vector (&sums)[R][2]) {
    for (long k = 0; k < steps; k++, panel += PANEL) {
        const Vector left = load(&panel->value), right = load(&panel->value + LANES);
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) {
            const float value = a[r * stride + k].value;
            sums[r][0] += value * left;
            sums[r][1] += value * right;
        }
    }
}

#if defined(__AVX512BF16__)
struct BFloat16 {
    uint16_t bits;
    static constexpr int PAIR = 2;
#if defined(__AMX_BF16__)
    static constexpr int STEP = 32, UNIT = 16, TILE = 7 * UNIT;
#else
    static constexpr int STEP = 2, UNIT = 1, TILE = 3 * ROWS;
#endif

    // 2^x with a relative error of 8e-5; that of a bfloat16 is 4e-3.
    static Vector power_of_two(Vector x) {
        const __m512 rounded = _mm512_roundscale_ps((__m512)x, 0);
        const Vector rest = x - (Vector)rounded;
        const Vector p = polynomial(rest, {0.055171672f, 0.24261113f, 0.69326097f, 0.99992806f});
        return (Vector)_mm512_scalef_ps((__m512)p, rounded);
    }

    static Vector gelu(Vector x) {  // to 4e-5
        return ::gelu(x, 4.0f, {-0.0054581496f, 0.016422676f, -0.026519801f, 0.04324329f, -0.07299082f, 0.11210166f,
                                -0.16871493f, 0.3518955f});
    }
};

inline void put(BFloat16* to, Vector values) {
    const __m256bh rounded = _mm512_cvtneps_pbh((__m512)values);
    std::memcpy(to, &rounded, sizeof rounded);
}
inline void put(BFloat16* to, float value) {
    const __m128bh rounded = _mm_cvtneps_pbh(_mm_set_ss(value));
    std::memcpy(to, &rounded, sizeof *to);
}

inline void put(BFloat16* to, Vector left, Vector right) {
    const __m512bh rounded = _mm512_cvtne2ps_pbh((__m512)right, (__m512)left);
    std::memcpy(to, &rounded, sizeof rounded);
}

inline void put_row(BFloat16* panel, long row, Vector left, Vector right) {
    const __mmask32 every_second = row % 2 ? 0xaaaaaaaa : 0x55555555;
    BFloat16* pair = panel + row / 2 * 2 * PANEL;
    for (const Vector values : {left, right}) {
        const __m512i wide = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)values));
        _mm512_mask_storeu_epi16(pair, every_second, row % 2 ? _mm512_slli_epi32(wide, 16) : wide);
        pair += 2 * LANES;
    }
}

inline void put_column(BFloat16* panel, long column, Vector left, Vector right) {
    const __m512i rows = (__m512i)(lanes() * PANEL);
    const __m512i pairs = (__m512i)_mm512_cvtne2ps_pbh((__m512)right, (__m512)left);
    _mm512_i32scatter_epi32(panel + 2 * column, rows, pairs, 4);
}

inline void put_columns(BFloat16* panel, long column, const float* from, Vector left, Vector right) {
    Integers rows[LANES];
    for (int i = 0; i < LANES; i++) {
        const Vector first = load(from + i * PANEL) + left, second = load(from + i * PANEL + LANES) + right;
        rows[i] = (Integers)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
    }
    transpose(rows);
    for (int i = 0; i < LANES; i++) std::memcpy(panel + 2 * (i * PANEL + column), &rows[i], sizeof rows[i]);
}

template <int R>
inline void multiply(const BFloat16* a, long stride, const BFloat16* panel, long steps, Vector (&sums)[R][2]) {
    for (long k = 0; k < steps; k++, panel += 2 * PANEL) {
        const __m512bh left = (__m512bh)_mm512_loadu_si512(panel), right = (__m512bh)_mm512_loadu_si512(panel + PANEL);
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) {
            int32_t pair;
            std::memcpy(&pair, a + r * stride + 2 * k, sizeof pair);
            const __m512bh values = (__m512bh)_mm512_set1_epi32(pair);
            sums[r][0] = (Vector)_mm512_dpbf16_ps((__m512)sums[r][0], values, left);
            sums[r][1] = (Vector)_mm512_dpbf16_ps((__m512)sums[r][1], values, right);
        }
    }
}
#endif

// --- Products ---------------------------------------------------------------------------------------------------------

// T[R, K] x panel (K, PANEL) -> float[R, PANEL], with a stride of `out`. If ADD, it is added to the values there.
template <class T, bool ADD, int R>
void product_of(const T* a, long stride, const T* panel, long width, float* c, long out) {
    Vector sums[R][2] = {};
    multiply<R>(a, stride, panel, width / T::PAIR, sums);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
        if (ADD) sums[r][0] += load(c + r * out), sums[r][1] += load(c + r * out + LANES);
        store(c + r * out, sums[r][0]);
        store(c + r * out + LANES, sums[r][1]);
    }
}

template <class T, bool ADD, int... R>
inline void choose(std::integer_sequence<int, R...>, int rows, const T* a, long stride, const T* panel, long width,
                   float* c, long out) {
    static constexpr decltype(&product_of<T, ADD, 1>) by_rows[] = {&product_of<T, ADD, R + 1>...};
    by_rows[rows - 1](a, stride, panel, width, c, out);
}

// T[rows, K] x panel (K, PANEL) -> float[rows, PANEL]. K is a multiple of T::STEP, and the number of written rows is one of
// T::UNIT.
template <bool ADD, class T>
inline void product(int rows, const T* a, long stride, const T* panel, long width, float* c, long out) {
    const int groups = (rows + ROWS - 1) / ROWS;
    for (int group = 0; group < groups; group++) {
        const int from = rows * group / groups, to = rows * (group + 1) / groups;
        choose<T, ADD>(std::make_integer_sequence<int, ROWS>{}, to - from, a + from * stride, stride, panel, width,
                       c + from * out, out);
    }
}

#if defined(__AMX_BF16__)
template <bool ADD, bool TWO>
inline void product_of_units(const BFloat16* a, long stride, const BFloat16* panel, long width, float* c, long out) {
    float* const lower = c + BFloat16::UNIT * out;
    asm volatile("" ::: "memory");  // the compiler does not know that loading a tile reads memory
    if (ADD) {
        _tile_loadd(0, c, 4 * out);
        _tile_loadd(1, c + LANES, 4 * out);
        if (TWO) _tile_loadd(2, lower, 4 * out);
        if (TWO) _tile_loadd(3, lower + LANES, 4 * out);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        if (TWO) _tile_zero(2);
        if (TWO) _tile_zero(3);
    }
    for (long k = 0; k < width; k += BFloat16::STEP) {
        _tile_loadd(6, panel + k * PANEL, 4 * PANEL);
        _tile_loadd(7, panel + k * PANEL + 2 * LANES, 4 * PANEL);
        _tile_loadd(4, a + k, 2 * stride);
        if (TWO) _tile_loadd(5, a + BFloat16::UNIT * stride + k, 2 * stride);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (TWO) _tile_dpbf16ps(2, 5, 6);
        if (TWO) _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, 4 * out);
    _tile_stored(1, c + LANES, 4 * out);
    if (TWO) _tile_stored(2, lower, 4 * out);
    if (TWO) _tile_stored(3, lower + LANES, 4 * out);
}

template <bool ADD>
inline void product(int rows, const BFloat16* a, long stride, const BFloat16* panel, long width, float* c, long out) {
    constexpr int two = 2 * BFloat16::UNIT;
    for (; rows > 0; rows -= two, a += two * stride, c += two * out) {
        (rows > BFloat16::UNIT ? product_of_units<ADD, true>
                               : product_of_units<ADD, false>)(a, stride, panel, width, c, out);
    }
}
#endif

// Sets up the matrix units of this thread for products. At the end, oneDNN's own settings are restored.
template <class T>
struct MatrixUnits {};

#if defined(__AMX_BF16__)
template <>
struct MatrixUnits<BFloat16> {
    struct alignas(64) Settings {
        uint8_t palette, start, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } before;

    MatrixUnits() {
        asm volatile("sttilecfg %0" : "=m"(before));
        Settings settings = {};
        settings.palette = 1;
        for (int tile = 0; tile < 8; tile++) settings.bytes[tile] = 64, settings.rows[tile] = 16;
        asm volatile("ldtilecfg %0" ::"m"(settings));
    }
    MatrixUnits(const MatrixUnits&) = delete;
    ~MatrixUnits() { asm volatile("ldtilecfg %0" ::"m"(before)); }
};
#endif

// --- The encoder ------------------------------------------------------------------------------------------------------

// The order of the values from compiled_encoder.py.
struct Shape {
    long tokens, width, inner, heads, layers;
    float layer_epsilon, rms_epsilon;
};

struct Layer {
    const float *norm1, *norm1_bias;
    const void* qkv;
    const float* qkv_bias;
    const void* output;
    const float* output_bias;
    const float *norm2, *norm2_bias;
    const void* fc1;
    const float* fc1_bias;
    const void* fc2;
    const float* fc2_bias;
};

struct Weights {
    const float* norm;
    const void* to_scores;  // for CLS alone, see `cls`
    const float* to_scores_bias;
    const void* from_values;
    const float* from_values_bias;
    Layer layers[];
};

template <class T>
inline const T* panel_of(const void* matrix, long width, long number) {
    return static_cast<const T*>(matrix) + number * width * PANEL;
}

// x[rows, D] += T[rows, K] x (K, D)
template <class T>
void add_product(long rows, const T* a, long depth, const void* matrix, float* x, long width) {
    for (long o = 0; o < width; o += PANEL) {
        product<true>(int(rows), a, depth, panel_of<T>(matrix, depth, o / PANEL), depth, x + o, width);
    }
}

template <class T>
inline void put_values(T* row, const float* line, long count) {
    long i = 0;
    for (; i + LANES <= count; i += LANES) put(row + i, load(line + i));
    for (; i < count; i++) put(row + i, line[i]);
}
template <class T>
inline void put_values(T* row, const uint8_t* line, long count) {  // as -128..127
    long i = 0;
    for (; i + LANES <= count; i += LANES) {
        put(row + i, __builtin_convertvector(widen(line + i) - 128, Vector));
    }
    for (; i < count; i++) put(row + i, float(line[i]) - 128.0f);
}

// --- Stems ------------------------------------------------------------------------------------------------------------
//
// A stem writes x[from, to) of an item, the sum of what its values give and of positions. Token 0 is CLS. `room` is what it
// needs of a thread's memory.

// uint8[H, W, C] or float[C, H, W]
struct Picture {
    const void* values;
    bool raw;
};

struct Patches {
    using Item = Picture;
    long side, patch, channels, height;  // of the grid, of a patch, and pixels of a picture
    const void* pixels;
    const float* pixels_start;  // float[n, D]; products of pixels are added to it
    const void* bytes;
    const float* bytes_start;

    long values() const { return up(patch * patch * channels, PANEL); }

    template <class T>
    size_t room(long) const {
        return sizeof(T) * T::TILE * values();
    }

    // The pixels of a tile's patches, row by row, times the kernel. CLS has no pixels.
    template <class T>
    void embed(const Picture& picture, long from, long to, float* x, long width, T* patches, float*) const {
        const long rows = to - from, row = patch * channels, deep = values();
        std::memcpy(x, (picture.raw ? bytes_start : pixels_start) + from * width, sizeof(float) * rows * width);
        T* next = patches;
        if (from == 0) {
            for (long i = 0; i < deep; i++) put(next + i, 0.0f);
            next += deep, from = 1;
        }
        while (from < to) {  // all patches of one row of the grid
            const long down = (from - 1) / side, end = 1 + (down + 1) * side;
            const long count = (end < to ? end : to) - from, pixel = down * patch * height + (from - 1) % side * patch;
            if (picture.raw) {
                const uint8_t* line = static_cast<const uint8_t*>(picture.values) + pixel * channels;
                for (long y = 0; y < patch; y++, line += height * channels) {
                    for (long t = 0; t < count; t++) put_values(next + t * deep + y * row, line + t * row, row);
                }
            } else {
                const float* line = static_cast<const float*>(picture.values) + pixel;
                for (long c = 0; c < channels; c++, line += height * (height - patch)) {
                    for (long y = 0; y < patch; y++, line += height) {
                        T* to_line = next + (c * patch + y) * patch;
                        for (long t = 0; t < count; t++) put_values(to_line + t * deep, line + t * patch, patch);
                    }
                }
            }
            for (long t = 0; t < count; t++) {
                for (long i = patch * row; i < deep; i++) put(next + t * deep + i, 0.0f);
            }
            from += count, next += count * deep;
        }
        add_product(rows, patches, deep, picture.raw ? bytes : pixels, x, width);
    }
};

// float[F, M]
struct Sound {
    const float* features;
    long frames;
};

// Convolutions of three frames, the first of stride 1, the others of stride 2, each followed by GELU. In memory, the three
// frames under a kernel follow each other. So a convolution is a product whose rows overlap: they are a stride apart.
struct Convolutions {
    using Item = Sound;
    struct Kernel {
        const void* matrix;  // (D, 3 M) or (D, 3 D)
        const float* bias;
    };
    long bands, halvings;
    const float* start;  // float[n, D]: CLS, then positions
    const Kernel* kernels;

    // Rows of a tile's frames after convolution number `step`; before the first one for -1.
    template <class T>
    static long rows_of(long step, long last) {
        return step < 0 ? rows_of<T>(0, last) + 2 : (T::TILE + 1) << (last - step);
    }
    long channels(long step, long width) const { return step < 0 ? bands : width; }
    static long length(long frames, long step) {
        for (; step > 0; step--) frames = (frames + 1) / 2;
        return frames;
    }
    // Products read whole units of rows and whole steps of values.
    template <class T>
    long values(long step, long width) const {
        return up((rows_of<T>(step, halvings) + 2 * T::UNIT) * channels(step, width) + 2 * PANEL, PANEL);
    }

    template <class T>
    size_t room(long width) const {  // two steps at a time
        const long frames = values<T>(-1, width), second = values<T>(1, width);
        return sizeof(T) * ((frames > second ? frames : second) + values<T>(0, width));
    }

    template <class T>
    void embed(const Sound& sound, long from, long to, float* x, long width, T* room, float* sums) const {
        if (from == 0) {
            std::memcpy(x, start, sizeof(float) * width);
            if (++from == to) return;
            x += width;
        }
        long first[40], last[40];  // the rows of each step that are needed, from those of the last
        first[halvings] = from - 1, last[halvings] = to - 1;
        for (long step = halvings; step > 0; step--) {
            first[step - 1] = 2 * first[step] - 1, last[step - 1] = 2 * last[step];
            if (first[step - 1] < 0) first[step - 1] = 0;
            if (const long end = length(sound.frames, step - 1); last[step - 1] > end) last[step - 1] = end;
        }
        T* const other = room + values<T>(0, width);
        T *before = other, *after = room;
        // One row of padding is before the first frame; before others it is a real one. So is it at the end.
        const long begin = first[0] > 0 ? first[0] - 1 : 0, end = last[0] < sound.frames ? last[0] + 1 : sound.frames;
        T* next = before;
        if (begin == first[0]) next = zeros(next, bands);
        put_values(next, sound.features + begin * bands, (end - begin) * bands);
        next += (end - begin) * bands;
        if (end == last[0]) next = zeros(next, bands);
        zeros(next, 2 * PANEL);
        for (long step = 0; step <= halvings; step++) {
            const long deep = 3 * channels(step - 1, width), stored = up(deep, PANEL), read = up(deep, T::STEP);
            const long apart = (step ? 2 : 1) * channels(step - 1, width), count = last[step] - first[step];
            const bool ends = step == halvings;
            // the next step starts at 2 t - 1: a row of zeros where t is 0
            T* rows = ends || 2 * first[step + 1] - 1 >= first[step] ? after : zeros(after, width);
            for (long row = 0; row < count; row += T::TILE) {
                const long some = count - row < T::TILE ? count - row : T::TILE;
                for (long o = 0; o < width; o += PANEL) {
                    const T* panel = panel_of<T>(kernels[step].matrix, stored, o / PANEL);
                    product<false>(int(some), before + row * apart, apart, panel, read, sums, PANEL);
                    const Vector left = load(kernels[step].bias + o), right = load(kernels[step].bias + o + LANES);
                    for (long r = 0; r < some; r++) {
                        const Vector one = T::gelu(load(sums + r * PANEL) + left);
                        const Vector two = T::gelu(load(sums + r * PANEL + LANES) + right);
                        if (ends) {
                            const float* place = start + (from + row + r) * width + o;
                            float* to_place = x + (row + r) * width + o;
                            store(to_place, one + load(place)), store(to_place + LANES, two + load(place + LANES));
                        } else {
                            put(rows + (row + r) * width + o, one, two);
                        }
                    }
                }
            }
            if (ends) break;
            T* const behind = rows + count * width;
            zeros(behind, width + 2 * PANEL);
            std::swap(before, after);
        }
    }

    template <class T>
    static T* zeros(T* to, long count) {
        std::memset(static_cast<void*>(to), 0, count * sizeof *to);
        return to + count;
    }
};

// --- Blocks -----------------------------------------------------------------------------------------------------------

// The data of one item between two phases.
template <class T>
struct Tokens {
    float* x;    // [n, D]
    T* queries;  // [n, D]
    T *keys[2], *values[2];  // panels (n, d) and (d, n) for each head; one set in use, one for the next block
};

template <class T, class Stem>
class Encoder {
   public:
    using Item = typename Stem::Item;

    Encoder(const Shape& shape, const Weights& weights, const Stem& stem)
        : s(shape), w(weights), stem(stem), depth(shape.width / shape.heads) {}

    size_t bytes_of_item() const {
        return residual_bytes() + query_bytes() + 2 * (key_bytes() + value_bytes());
    }

    // `item(number)` is one of the batch. `work` has room for one item for each thread.
    template <class Items>
    void run(const Items& item, long batch, bool cls_only, char* work, float* out, int threads) const {
        const long rest = batch % threads, alone = batch - rest;
        const long tiles = (s.tokens + T::TILE - 1) / T::TILE;
        long parts = rest * tiles < 4 * threads && rest > 0 ? (4 * threads + rest - 1) / rest : tiles;
        if (parts > units()) parts = units();
        const long whole = cls_only ? s.layers - 1 : s.layers;  // blocks that are computed for all tokens
        const long result_size = (cls_only ? 1 : s.tokens) * s.width;
        int taken = 0;
#pragma omp parallel num_threads(threads)
        {
            Scratch scratch(*this);
            [[maybe_unused]] const MatrixUnits<T> ready;
            int mine;
#pragma omp atomic capture
            mine = taken++;
            const auto task = [&](long number, long slot, long layer, long tile, long of) {
                const Tokens<T> tokens = place(work, slot);
                const long from = first_token(tile, of), to = first_token(tile + 1, of);
                if (layer < 0) {
                    if (tile == of - 1) clear(tokens);  // the others write other values
                    stem.template embed<T>(item(number), from, to, tokens.x + from * s.width, s.width, scratch.rows,
                                           scratch.sums);
                } else {
                    block(layer, from, to, tokens, scratch);
                }
                if (layer + 1 < whole) {
                    project(layer + 1, from, to, tokens, scratch);
                } else if (!cls_only) {
                    for (long t = from; t < to; t++) {
                        rms_norm(tokens.x + t * s.width, out + number * result_size + t * s.width);
                    }
                }
            };
#pragma omp for schedule(dynamic)
            for (long number = 0; number < alone; number++) {
                for (long layer = -1; layer < whole; layer++) {
                    for (long tile = 0; tile < tiles; tile++) task(number, mine, layer, tile, tiles);
                }
                if (cls_only) cls(place(work, mine), out + number * result_size, scratch);
            }
            for (long layer = -1; layer < whole; layer++) {
#pragma omp for schedule(dynamic)
                for (long i = 0; i < rest * parts; i++) task(alone + i / parts, i / parts, layer, i % parts, parts);
            }
#pragma omp for schedule(dynamic)
            for (long i = 0; i < (cls_only ? rest : 0); i++) cls(place(work, i), out + (alone + i) * result_size, scratch);
        }
    }

   private:
    const Shape& s;
    const Weights& w;
    const Stem& stem;
    const long depth;

    static size_t bytes(size_t wanted) { return up(wanted, 64); }
    long units() const { return (s.tokens + T::UNIT - 1) / T::UNIT; }
    long first_token(long tile, long tiles) const {
        const long token = units() * tile / tiles * T::UNIT;
        return token < s.tokens ? token : s.tokens;
    }
    long padded() const { return up(s.tokens, PANEL); }
    long stepped() const { return up(s.tokens, T::STEP); }
    size_t residual_bytes() const { return bytes(sizeof(float) * units() * T::UNIT * s.width); }
    size_t query_bytes() const { return bytes(sizeof(T) * units() * T::UNIT * s.width); }
    size_t key_bytes() const { return bytes(sizeof(T) * s.width * padded()); }
    size_t value_bytes() const { return bytes(sizeof(T) * s.width * stepped()); }
    static const T* panel(const void* matrix, long width, long number) { return panel_of<T>(matrix, width, number); }

    Tokens<T> place(char* work, long number) const {
        work += number * bytes_of_item();
        Tokens<T> tokens;
        const auto take = [&work](size_t size) { return std::exchange(work, work + size); };
        tokens.x = reinterpret_cast<float*>(take(residual_bytes()));
        tokens.queries = reinterpret_cast<T*>(take(query_bytes()));
        for (int turn = 0; turn < 2; turn++) {
            tokens.keys[turn] = reinterpret_cast<T*>(take(key_bytes()));
            tokens.values[turn] = reinterpret_cast<T*>(take(value_bytes()));
        }
        return tokens;
    }

    // Values that no token writes are multiplied by weights of zero, so they must be numbers. An item of another length may
    // have left anything there.
    void clear(const Tokens<T>& p) const {
        const size_t size = sizeof(T) * PANEL * T::PAIR;
        for (T* values : p.values) {
            for (long i = 0; i < s.width; i += PANEL) {
                T* const head = values + i * stepped();
                for (long t = s.tokens / T::PAIR; t < stepped() / T::PAIR; t++) {
                    std::memset(static_cast<void*>(head + t * T::PAIR * PANEL), 0, size);
                }
            }
        }
    }

    // The memory of a thread for a tile.
    struct Scratch {
        float* sums;    // [TILE, PANEL]
        float* scores;  // [TILE, padded n]
        float* normed;  // [n, D], for CLS alone
        T* rows;        // [TILE, D], or what the stem needs
        T* inner;       // [TILE, F, or padded n]
        float* query;   // [h, D], for CLS alone as well
        T* all_heads;   // [UNIT, h, D]; one row counts
        float *means, *scales;  // [n]
        void* memory;

        explicit Scratch(const Encoder& e) {
            constexpr long TILE = T::TILE, UNIT = T::UNIT;
            const long n = e.padded(), deep = e.s.inner > n ? e.s.inner : n;
            const long rows_bytes = sizeof(T) * TILE * e.s.width, room = e.stem.template room<T>(e.s.width);
            const long sizes[] = {4 * TILE * PANEL, 4 * TILE * n, 4 * e.s.tokens * e.s.width,
                                  rows_bytes > room ? rows_bytes : room, long(sizeof(T)) * TILE * deep,
                                  4 * e.s.heads * e.s.width, long(sizeof(T)) * UNIT * e.s.heads * e.s.width,
                                  4 * e.s.tokens, 4 * e.s.tokens};
            size_t total = 0;
            for (long size : sizes) total += bytes(size);
            memory = std::aligned_alloc(64, total);
            char* next = static_cast<char*>(memory);
            const auto take = [&](int i) { return std::exchange(next, next + bytes(sizes[i])); };
            sums = reinterpret_cast<float*>(take(0));
            scores = reinterpret_cast<float*>(take(1));
            normed = reinterpret_cast<float*>(take(2));
            rows = reinterpret_cast<T*>(take(3));
            inner = reinterpret_cast<T*>(take(4));
            query = reinterpret_cast<float*>(take(5));
            all_heads = reinterpret_cast<T*>(take(6));
            means = reinterpret_cast<float*>(take(7));
            scales = reinterpret_cast<float*>(take(8));
        }
        Scratch(const Scratch&) = delete;
        ~Scratch() { std::free(memory); }
    };

    // norm(x[rows, D]). The next product is added to x, so x gets its bias here. Means and scales of all rows are computed first:
    // while it waited for those of one row, a processor could not begin with another.
    template <class To>
    void layer_norm(long rows, float* x, const float* weight, const float* bias, const float* next, To* out,
                    Scratch& scratch) const {
        float *means = scratch.means, *scales = scratch.scales;
        for (long r = 0; r < rows; r++) {
            const float* row = x + r * s.width;
            Vector total = {}, squares = {};
            for (long i = 0; i < s.width; i += LANES) total += load(row + i);
            const float mean = means[r] = sum(total) / s.width;
            for (long i = 0; i < s.width; i += LANES) {
                const Vector off = load(row + i) - mean;
                squares += off * off;
            }
            scales[r] = 1.0f / __builtin_sqrtf(sum(squares) / s.width + s.layer_epsilon);
        }
        for (long r = 0; r < rows; r++, x += s.width, out += s.width) {
            const float mean = means[r], scale = scales[r];
            for (long i = 0; i < s.width; i += LANES) {
                put(out + i, (load(x + i) - mean) * scale * load(weight + i) + load(bias + i));
                store(x + i, load(x + i) + load(next + i));
            }
        }
    }

    void rms_norm(const float* x, float* out) const {
        Vector squares = {};
        for (long i = 0; i < s.width; i += LANES) squares += load(x + i) * load(x + i);
        const float scale = 1.0f / __builtin_sqrtf(sum(squares) / s.width + s.rms_epsilon);
        for (long i = 0; i < s.width; i += LANES) store(out + i, load(x + i) * scale * load(w.norm + i));
    }

    // Queries, keys and values of a tile, stored where the block reads them.
    void project(long number, long from, long to, const Tokens<T>& p, Scratch& scratch) const {
        const Layer& layer = w.layers[number];
        const long rows = to - from, width = s.width;
        T *keys = p.keys[number % 2], *values = p.values[number % 2];
        layer_norm(rows, p.x + from * width, layer.norm1, layer.norm1_bias, layer.output_bias, scratch.rows, scratch);
        for (long o = 0; o < 3 * width; o += PANEL) {
            product<false>(int(rows), scratch.rows, width, panel(layer.qkv, width, o / PANEL), width, scratch.sums, PANEL);
            const Vector left = load(layer.qkv_bias + o), right = load(layer.qkv_bias + o + LANES);
            const long i = o % width;
            T* head;
            if (o < width) {
                head = p.queries + i;
            } else if (o < 2 * width) {  // [h][n/PANEL][d][PANEL], in pairs [n/PANEL][d/2][PANEL][2]
                head = keys + i / depth * depth * padded() + i % depth * PANEL;
            } else {  // [D/PANEL][n][PANEL], in pairs [n/2][PANEL][2]
                head = values + i * stepped();
            }
            for (long r = 0; r < rows; r++) {
                const float* sums = scratch.sums + r * PANEL;
                const long token = from + r;
                if (width <= o && o < 2 * width && token % LANES == 0 && r + LANES <= rows) {
                    put_columns(head + token / PANEL * depth * PANEL, token % PANEL, sums, left, right);
                    r += LANES - 1;
                    continue;
                }
                const Vector first = load(sums) + left, second = load(sums + LANES) + right;
                if (o < width) {
                    put(head + token * width, first, second);
                } else if (o < 2 * width) {
                    put_column(head + token / PANEL * depth * PANEL, token % PANEL, first, second);
                } else {
                    put_row(head, token, first, second);
                }
            }
        }
    }

    // x + attention(norm(x)), with queries that are computed already; then x + mlp(norm(x)).
    void block(long number, long from, long to, const Tokens<T>& p, Scratch& scratch) const {
        const Layer& layer = w.layers[number];
        const long rows = to - from, width = s.width;
        float* x = p.x + from * width;
        for (long head = 0; head < s.heads; head++) {
            float scale[T::TILE];
            const T* query = p.queries + from * width + head * depth;
            const T* keys = p.keys[number % 2] + head * depth * padded();
            for (long key = 0; key < s.tokens; key += PANEL) {
                product<false>(int(rows), query, width, keys + key * depth, depth, scratch.scores + key, padded());
            }
            for (long r = 0; r < rows; r++) {
                scale[r] = 1.0f / soften(scratch.scores + r * padded(), scratch.inner + r * padded());
            }
            for (long i = 0; i < depth; i += PANEL) {
                const T* values = p.values[number % 2] + (head * depth + i) * stepped();
                product<false>(int(rows), scratch.inner, padded(), values, stepped(), scratch.sums, PANEL);
                for (long r = 0; r < rows; r++) {
                    const float* sums = scratch.sums + r * PANEL;
                    put(scratch.rows + r * width + head * depth + i, load(sums) * scale[r], load(sums + LANES) * scale[r]);
                }
            }
        }
        add_product(rows, scratch.rows, width, layer.output, x, width);
        mlp(layer, rows, x, scratch);
    }

    // x + mlp(norm(x))
    void mlp(const Layer& layer, long rows, float* x, Scratch& scratch) const {
        const long width = s.width, inner = s.inner;
        layer_norm(rows, x, layer.norm2, layer.norm2_bias, layer.fc2_bias, scratch.rows, scratch);
        for (long o = 0; o < inner; o += PANEL) {
            product<false>(int(rows), scratch.rows, width, panel(layer.fc1, width, o / PANEL), width, scratch.sums, PANEL);
            const Vector left = load(layer.fc1_bias + o), right = load(layer.fc1_bias + o + LANES);
            for (long r = 0; r < rows; r++) {
                const float* sums = scratch.sums + r * PANEL;
                put(scratch.inner + r * inner + o, T::gelu(load(sums) + left), T::gelu(load(sums + LANES) + right));
            }
        }
        add_product(rows, scratch.inner, inner, layer.fc2, x, width);
    }

    // Turns scores of one query into weights, by powers of two, and returns the sum of the weights. Weights of keys that do not
    // exist are zero. Scores and weights are read and written more than once, so they have separate memory.
    template <class To>
    float soften(float* scores, To* weights) const {
        const float total = powers(scores, 0.0f, weights);
        if (total > 0x1p-100f && total < 0x1p100f) return total;  // not all are too small, and none is too large
        for (long i = s.tokens; i < up(s.tokens, LANES); i++) scores[i] = scores[0];
        Vector most = load(scores);
        for (long i = LANES; i < s.tokens; i += LANES) most = larger(most, load(scores + i));
        return powers(scores, reduce(most, larger), weights);
    }

    // Computes 2^(score - origin) of each score, and returns their sum.
    template <class To>
    float powers(const float* scores, float origin, To* weights) const {
        const long whole = s.tokens / LANES * LANES;
        Vector total = {};
        for (long i = 0; i < whole; i += LANES) {
            const Vector power = T::power_of_two(load(scores + i) - origin);
            total += power;
            put(weights + i, power);
        }
        if (whole < s.tokens) {
            const Vector power = T::power_of_two(load(scores + whole) - origin);
            const Vector last = lanes() < int32_t(s.tokens - whole) ? power : Vector{};
            total += last;
            put(weights + whole, last);
        }
        for (long i = up(s.tokens, LANES); i < stepped(); i += LANES) put(weights + i, Vector{});
        return sum(total);
    }

    // The last block for CLS alone. Its query is multiplied with the keys' weights, since q (W_k h) = (q W_k) h, and the weighted
    // sum is taken before the values' weights. So neither keys nor values are computed.
    void cls(const Tokens<T>& p, float* out, Scratch& scratch) const {
        const Layer& layer = w.layers[s.layers - 1];
        const long width = s.width;
        layer_norm(s.tokens, p.x, layer.norm1, layer.norm1_bias, w.from_values_bias, scratch.normed, scratch);
        for (long i = 0; i < width; i += LANES) put(scratch.rows + i, load(scratch.normed + i));
        float *query = scratch.query, *scores = scratch.scores, *weights = scores + padded();
        T* attended = scratch.all_heads;
        for (long o = 0; o < s.heads * width; o += PANEL) {
            product<false>(1, scratch.rows, width, panel(w.to_scores, width, o / PANEL), width, scratch.sums, PANEL);
            store(query + o, load(scratch.sums) + load(w.to_scores_bias + o));
            store(query + o + LANES, load(scratch.sums + LANES) + load(w.to_scores_bias + o + LANES));
        }
        for (long head = 0; head < s.heads; head++, query += width, attended += width) {
            for (long t = 0; t < s.tokens; t++) {
                Vector products = {};
                for (long i = 0; i < width; i += LANES) {
                    products += load(query + i) * load(scratch.normed + t * width + i);
                }
                scores[t] = sum(products);
            }
            const float scale = 1.0f / soften(scores, weights);
            for (long i = 0; i < width; i += LANES) {
                Vector added = {};
                for (long t = 0; t < s.tokens; t++) added += weights[t] * load(scratch.normed + t * width + i);
                put(attended + i, added * scale);
            }
        }
        add_product(1, scratch.all_heads, s.heads * width, w.from_values, p.x, width);
        mlp(layer, 1, p.x, scratch);
        rms_norm(p.x, out);
    }
};

// Sounds of different lengths. Each thread encodes some, and all threads share those that are left. `work` has room for the
// longest for each thread; `apart` is how far the results of two sounds are from each other.
template <class T>
void run_sounds(const Shape& shape, const Weights& weights, const Convolutions& stem, const Sound* sounds, long batch,
                bool cls_only, char* work, size_t room, float* out, long apart, int threads) {
    const long rest = batch % threads, alone = batch - rest;
    const auto encode = [&](long number, char* mine, int running) {
        Shape own = shape;
        own.tokens = 1 + Convolutions::length(sounds[number].frames, stem.halvings);
        const Encoder<T, Convolutions> encoder(own, weights, stem);
        encoder.run([&](long) { return sounds[number]; }, 1, cls_only, mine, out + number * apart, running);
    };
    int taken = 0;
#pragma omp parallel num_threads(threads)
    {
        int mine;
#pragma omp atomic capture
        mine = taken++;
#pragma omp for schedule(dynamic)
        for (long number = 0; number < alone; number++) encode(number, work + mine * room, 1);
    }
    for (long number = alone; number < batch; number++) encode(number, work, threads);
}

template <class T>
size_t encode_pictures(const Shape* shape, const Weights* weights, const Patches* stem, const void* pictures, int raw, long batch,
                       int cls_only, char* work, float* out, int threads) {
    const Encoder<T, Patches> encoder(*shape, *weights, *stem);
    const size_t size = stem->channels * stem->height * stem->height * (raw ? 1 : sizeof(float));
    const auto picture = [&](long number) { return Picture{static_cast<const char*>(pictures) + number * size, raw != 0}; };
    if (batch > 0) encoder.run(picture, batch, cls_only, work, out, threads);
    return encoder.bytes_of_item();
}

template <class T>
size_t encode_sounds(const Shape* shape, const Weights* weights, const Convolutions* stem, const Sound* sounds, long batch,
                     int cls_only, char* work, float* out, long apart, int threads) {
    const size_t room = Encoder<T, Convolutions>(*shape, *weights, *stem).bytes_of_item();
    if (batch > 0) run_sounds<T>(*shape, *weights, *stem, sounds, batch, cls_only, work, room, out, apart, threads);
    return room;
}

}  // namespace

// Take shape, weights and items as described above; a shape has the tokens of the longest item. They return how many bytes of
// `work` an item takes. Without items, they do nothing else.
extern "C" {

int encoder_panel() { return PANEL; }

size_t encode_pictures_float32(const Shape* shape, const Weights* weights, const Patches* stem, const void* pictures, int raw,
                               long batch, int cls_only, char* work, float* out, int threads) {
    return encode_pictures<Float>(shape, weights, stem, pictures, raw, batch, cls_only, work, out, threads);
}
size_t encode_sounds_float32(const Shape* shape, const Weights* weights, const Convolutions* stem, const Sound* sounds,
                             long batch, int cls_only, char* work, float* out, long apart, int threads) {
    return encode_sounds<Float>(shape, weights, stem, sounds, batch, cls_only, work, out, apart, threads);
}

#if defined(__AVX512BF16__)
size_t encode_pictures_bfloat16(const Shape* shape, const Weights* weights, const Patches* stem, const void* pictures, int raw,
                                long batch, int cls_only, char* work, float* out, int threads) {
    return encode_pictures<BFloat16>(shape, weights, stem, pictures, raw, batch, cls_only, work, out, threads);
}
size_t encode_sounds_bfloat16(const Shape* shape, const Weights* weights, const Convolutions* stem, const Sound* sounds,
                              long batch, int cls_only, char* work, float* out, long apart, int threads) {
    return encode_sounds<BFloat16>(shape, weights, stem, sounds, batch, cls_only, work, out, apart, threads);
}
#endif
}
