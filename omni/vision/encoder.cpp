// The encoder of modeling_vision.py on the vector units of a CPU; compiled.py builds, packs for and calls it.
//
// A picture's tokens are cut into tiles of at most TILE tokens. All of a block but its attention concerns one token at a
// time, so a tile goes from one attention to the next without leaving the first cache:
//
//     patches + positions                                  embed
//     -> norm -> queries, keys, values                     project
//     == all tiles of a picture have come so far ==
//     -> attention -> output + x -> norm -> MLP + x        block
//     -> project for the next block, or the final norm
//
// Threads take tiles as they become free and wait for each other once a block.
//
// Shapes: n tokens, D width, F width of the MLP, h heads of d = D/h. The stream x of residual sums is float32, whatever T
// the products read: float, or bfloat16 with sums in float32. A matrix (O, K) lies in panels [O/PANEL][K][PANEL], of
// bfloat16 [O/PANEL][K/2][PANEL][2], which a product reads from beginning to end.

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "vectors.h"
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace {

#if LANES == 16
constexpr int ROWS = 14;  // 28 registers of sums, 2 of weights, 1 of values: of 32
constexpr int TILE = ROWS;
#else
constexpr int ROWS = 6;  // 12 + 2 + 1 of 16
constexpr int TILE = 3 * ROWS;  // such processors have second caches that hold less than the weights of a block
#endif
constexpr int PANEL = 2 * LANES;

// x (1 + erf(x / sqrt 2)) / 2; erf to 5e-7, by a polynomial in x^2 on 0..25.
inline Vector gelu(Vector x) {
    const Vector clamped = smaller(larger(x, all(-5.0f)), all(5.0f));
    const Vector w = clamped * clamped * 0.08f - 1.0f;
    Vector p = all(0.0012174416f);
    p = p * w + -0.0032265252f;
    p = p * w + 0.0034456353f;
    p = p * w + -0.0053711627f;
    p = p * w + 0.012820982f;
    p = p * w + -0.022328667f;
    p = p * w + 0.032804366f;
    p = p * w + -0.04653731f;
    p = p * w + 0.06288434f;
    p = p * w + -0.08088522f;
    p = p * w + 0.103041045f;
    p = p * w + -0.14059256f;
    p = p * w + 0.28272757f;
    const Vector half = x * 0.5f;
    return half + half * (clamped * p);
}

// --- Types that products read ----------------------------------------------------------------------------------------

struct Float {
    float value;
    static constexpr int PAIR = 1;  // values that one step of a product takes from a row
};

inline void put(float* to, Vector values) { store(to, values); }
inline void put(Float* to, Vector values) { store(&to->value, values); }
inline void put(Float* to, float value) { to->value = value; }

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
};

inline void put(BFloat16* to, Vector values) {
    const __m256bh rounded = _mm512_cvtneps_pbh((__m512)values);
    std::memcpy(to, &rounded, sizeof rounded);
}
inline void put(BFloat16* to, float value) {
    const __m128bh rounded = _mm_cvtneps_pbh(_mm_set_ss(value));
    std::memcpy(to, &rounded, sizeof *to);
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

// T[R, K] x panel (K, PANEL) -> float[R, PANEL], whose rows are `out` apart.
template <class T, int R>
void product_of(const T* a, long stride, const T* panel, long width, float* c, long out) {
    Vector sums[R][2] = {};
    multiply<R>(a, stride, panel, (width + T::PAIR - 1) / T::PAIR, sums);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
        store(c + r * out, sums[r][0]);
        store(c + r * out + LANES, sums[r][1]);
    }
}

template <class T, int... R>
inline void choose(std::integer_sequence<int, R...>, int rows, const T* a, long stride, const T* panel, long width,
                   float* c, long out) {
    static constexpr decltype(&product_of<T, 1>) by_rows[] = {&product_of<T, R + 1>...};
    by_rows[rows - 1](a, stride, panel, width, c, out);
}

template <class T>
inline void product(int rows, const T* a, long stride, const T* panel, long width, float* c, long out) {
    const int groups = (rows + ROWS - 1) / ROWS;
    for (int group = 0; group < groups; group++) {
        const int from = rows * group / groups, to = rows * (group + 1) / groups;
        choose(std::make_integer_sequence<int, ROWS>{}, to - from, a + from * stride, stride, panel, width,
               c + from * out, out);
    }
}

// --- The encoder ------------------------------------------------------------------------------------------------------

long up(long value, long multiple) { return (value + multiple - 1) / multiple * multiple; }

// The order of what compiled.py hands over.
struct Shape {
    long tokens, width, inner, heads, layers;
    long side, patch, channels, height;  // of the grid, of a patch, and pixels of a picture
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
    const void* pixels;
    const float* pixels_start;  // float[n, D]: what the products of pixels are added to
    const void* bytes;
    const float* bytes_start;
    const float* norm;
    const void* to_scores;  // for CLS alone, see `cls`
    const float* to_scores_bias;
    const void* from_values;
    const float* from_values_bias;
    Layer layers[];
};

// What belongs to one picture between two phases.
template <class T>
struct Picture {
    float* x;    // [n, D]
    T* queries;  // [n, D]
    T *keys[2], *values[2];  // panels (n, d) and (d, n) for each head; those of the next block beside those in use
};

template <class T>
class Encoder {
   public:
    Encoder(const Shape& shape, const Weights& weights) : s(shape), w(weights), depth(shape.width / shape.heads) {}

    size_t bytes_of_picture() const {
        return bytes(4 * s.tokens * s.width) + bytes(sizeof(T) * s.tokens * s.width) + 2 * (key_bytes() + value_bytes());
    }

    void run(const void* pictures, bool raw, long batch, long at_once, bool cls_only, char* work, float* out,
             int threads) const {
        long tiles = (s.tokens + TILE - 1) / TILE;
        if (batch == 1) tiles = up(tiles, threads);
        if (tiles > s.tokens) tiles = s.tokens;
        const long whole = cls_only ? s.layers - 1 : s.layers;  // blocks that are computed for all tokens
        const size_t picture_bytes = s.channels * s.height * s.height * (raw ? 1 : sizeof(float));
#pragma omp parallel num_threads(threads)
        {
            Scratch scratch(*this);
            for (long first = 0; first < batch; first += at_once) {
                const long count = batch - first < at_once ? batch - first : at_once;
                const char* shown = static_cast<const char*>(pictures) + first * picture_bytes;
#pragma omp for schedule(dynamic)
                for (long task = 0; task < count * tiles; task++) {
                    const long p = task / tiles, from = task % tiles * s.tokens / tiles;
                    const long to = (task % tiles + 1) * s.tokens / tiles;
                    const Picture<T> picture = place(work, p);
                    embed(shown + p * picture_bytes, raw, from, to, picture, scratch);
                    if (whole > 0) project(0, from, to, picture, scratch);
                }
                for (long layer = 0; layer < whole; layer++) {
#pragma omp for schedule(dynamic)
                    for (long task = 0; task < count * tiles; task++) {
                        const long p = task / tiles, from = task % tiles * s.tokens / tiles;
                        const long to = (task % tiles + 1) * s.tokens / tiles;
                        const Picture<T> picture = place(work, p);
                        block(layer, from, to, picture, scratch);
                        if (layer + 1 < whole) {
                            project(layer + 1, from, to, picture, scratch);
                        } else if (!cls_only) {
                            for (long t = from; t < to; t++) {
                                rms_norm(picture.x + t * s.width, out + ((first + p) * s.tokens + t) * s.width);
                            }
                        }
                    }
                }
                if (cls_only) {
#pragma omp for schedule(dynamic)
                    for (long p = 0; p < count; p++) cls(place(work, p), out + (first + p) * s.width, scratch);
                }
            }
        }
    }

   private:
    const Shape& s;
    const Weights& w;
    const long depth;

    static size_t bytes(size_t wanted) { return up(wanted, 64); }
    long padded() const { return up(s.tokens, PANEL); }
    long paired() const { return up(s.tokens, T::PAIR); }
    size_t key_bytes() const { return bytes(sizeof(T) * s.width * padded()); }
    size_t value_bytes() const { return bytes(sizeof(T) * s.width * paired()); }
    static const T* panel(const void* matrix, long width, long number) {
        return static_cast<const T*>(matrix) + number * width * PANEL;
    }

    Picture<T> place(char* work, long p) const {
        work += p * bytes_of_picture();
        Picture<T> picture;
        const auto take = [&work](size_t size) { return std::exchange(work, work + size); };
        picture.x = reinterpret_cast<float*>(take(bytes(4 * s.tokens * s.width)));
        picture.queries = reinterpret_cast<T*>(take(bytes(sizeof(T) * s.tokens * s.width)));
        for (int turn = 0; turn < 2; turn++) {
            picture.keys[turn] = reinterpret_cast<T*>(take(key_bytes()));
            picture.values[turn] = reinterpret_cast<T*>(take(value_bytes()));
        }
        return picture;
    }

    // What a thread needs for a tile.
    struct Scratch {
        float* sums;    // [TILE, PANEL]
        float* scores;  // [TILE, padded n]
        float* normed;  // [n, D], for CLS alone
        T* rows;        // [TILE, D or values of a patch]
        T* inner;       // [TILE, F, or padded n]
        float* one;     // [h, D] and [padded n], for CLS alone as well
        T* all_heads;   // [h, D]
        void* memory;

        explicit Scratch(const Encoder& e) {
            const long values = e.s.patch * e.s.patch * e.s.channels, n = e.padded();
            const long wide = e.s.width > values ? e.s.width : values, deep = e.s.inner > n ? e.s.inner : n;
            const long sizes[] = {4 * TILE * PANEL, 4 * TILE * n, 4 * e.s.tokens * e.s.width,
                                  long(sizeof(T)) * TILE * wide, long(sizeof(T)) * TILE * deep,
                                  4 * (e.s.heads * e.s.width + n), long(sizeof(T)) * e.s.heads * e.s.width};
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
            one = reinterpret_cast<float*>(take(5));
            all_heads = reinterpret_cast<T*>(take(6));
        }
        Scratch(const Scratch&) = delete;
        ~Scratch() { std::free(memory); }
    };

    // Pixels of a tile's patches, row by row, times the kernel.
    void embed(const char* picture, bool raw, long from, long to, const Picture<T>& p, Scratch& scratch) const {
        const float* start = raw ? w.bytes_start : w.pixels_start;
        std::memcpy(p.x + from * s.width, start + from * s.width, 4 * (to - from) * s.width);
        if (from == 0) from = 1;  // CLS has no pixels
        if (from == to) return;
        const long values = s.patch * s.patch * s.channels;
        for (long t = from; t < to; t++) {
            const long down = (t - 1) / s.side * s.patch, across = (t - 1) % s.side * s.patch;
            T* row = scratch.rows + (t - from) * values;
            if (raw) {  // uint8[H, W, C], read as -128..127
                const long line = s.patch * s.channels;
                for (long y = 0; y < s.patch; y++) {
                    const uint8_t* pixels = reinterpret_cast<const uint8_t*>(picture) +
                                            ((down + y) * s.height + across) * s.channels;
                    for (long i = 0; i < line; i++) put(row++, float(int(pixels[i]) - 128));
                }
            } else {  // float[C, H, W]
                for (long c = 0; c < s.channels; c++) {
                    for (long y = 0; y < s.patch; y++) {
                        const float* pixels = reinterpret_cast<const float*>(picture) +
                                              (c * s.height + down + y) * s.height + across;
                        for (long i = 0; i < s.patch; i++) put(row++, pixels[i]);
                    }
                }
            }
        }
        add_product(to - from, scratch.rows, values, raw ? w.bytes : w.pixels, p.x + from * s.width, scratch);
    }

    // x[rows, D] += T[rows, K] x (K, D)
    void add_product(long rows, const T* a, long width, const void* matrix, float* x, Scratch& scratch) const {
        for (long o = 0; o < s.width; o += PANEL) {
            product(int(rows), a, width, panel(matrix, width, o / PANEL), width, scratch.sums, PANEL);
            for (long r = 0; r < rows; r++) {
                float* to = x + r * s.width + o;
                const float* sums = scratch.sums + r * PANEL;
                store(to, load(to) + load(sums));
                store(to + LANES, load(to + LANES) + load(sums + LANES));
            }
        }
    }

    void add_bias(long rows, const float* bias, float* x) const {
        for (long r = 0; r < rows; r++) {
            for (long i = 0; i < s.width; i += LANES) {
                float* to = x + r * s.width + i;
                store(to, load(to) + load(bias + i));
            }
        }
    }

    template <class To>
    void layer_norm(const float* x, const float* weight, const float* bias, To* out) const {
        Vector total = {}, squares = {};
        for (long i = 0; i < s.width; i += LANES) total += load(x + i);
        const float mean = sum(total) / s.width;
        for (long i = 0; i < s.width; i += LANES) {
            const Vector off = load(x + i) - mean;
            squares += off * off;
        }
        const float scale = 1.0f / __builtin_sqrtf(sum(squares) / s.width + s.layer_epsilon);
        for (long i = 0; i < s.width; i += LANES) {
            put(out + i, (load(x + i) - mean) * scale * load(weight + i) + load(bias + i));
        }
    }

    void rms_norm(const float* x, float* out) const {
        Vector squares = {};
        for (long i = 0; i < s.width; i += LANES) squares += load(x + i) * load(x + i);
        const float scale = 1.0f / __builtin_sqrtf(sum(squares) / s.width + s.rms_epsilon);
        for (long i = 0; i < s.width; i += LANES) store(out + i, load(x + i) * scale * load(w.norm + i));
    }

    // Queries, keys and values of a tile, where the block will look for them.
    void project(long number, long from, long to, const Picture<T>& p, Scratch& scratch) const {
        const Layer& layer = w.layers[number];
        const long rows = to - from, width = s.width;
        T *keys = p.keys[number % 2], *values = p.values[number % 2];
        for (long r = 0; r < rows; r++) {
            layer_norm(p.x + (from + r) * width, layer.norm1, layer.norm1_bias, scratch.rows + r * width);
        }
        for (long o = 0; o < 3 * width; o += PANEL) {
            product(int(rows), scratch.rows, width, panel(layer.qkv, width, o / PANEL), width, scratch.sums, PANEL);
            const Vector left = load(layer.qkv_bias + o), right = load(layer.qkv_bias + o + LANES);
            for (long r = 0; r < rows; r++) {
                float* sums = scratch.sums + r * PANEL;
                store(sums, load(sums) + left);
                store(sums + LANES, load(sums + LANES) + right);
            }
            const long i = o % width;
            if (o < width) {
                for (long r = 0; r < rows; r++) {
                    T* query = p.queries + (from + r) * width + i;
                    put(query, load(scratch.sums + r * PANEL));
                    put(query + LANES, load(scratch.sums + r * PANEL + LANES));
                }
            } else if (o < 2 * width) {  // [h][n/PANEL][d][PANEL], in pairs [n/PANEL][d/2][PANEL][2]
                T* head = keys + i / depth * depth * padded() + i % depth * PANEL;
                for (long r = 0; r < rows; r++) {
                    const long key = from + r;
                    T* column = head + key / PANEL * depth * PANEL + key % PANEL * T::PAIR;
                    const float* sums = scratch.sums + r * PANEL;
                    for (long j = 0; j < PANEL; j += T::PAIR) {
                        for (long k = 0; k < T::PAIR; k++) put(column + j * PANEL + k, sums[j + k]);
                    }
                }
            } else {  // [D/PANEL][n][PANEL], in pairs [n/2][PANEL][2]
                T* head = values + i * paired();
                for (long r = 0; r < rows; r++) {
                    const long key = from + r;
                    T* row = head + key / T::PAIR * T::PAIR * PANEL + key % T::PAIR;
                    const float* sums = scratch.sums + r * PANEL;
                    for (long j = 0; j < PANEL; j++) put(row + j * T::PAIR, sums[j]);
                }
                if (to == s.tokens && paired() > s.tokens) {  // nobody's values are weighted with zero
                    for (long j = 0; j < PANEL; j++) put(head + (paired() - 2) * PANEL + 2 * j + 1, 0.0f);
                }
            }
        }
    }

    // x + attention(norm(x)), of which the queries are there; then x + mlp(norm(x)).
    void block(long number, long from, long to, const Picture<T>& p, Scratch& scratch) const {
        const Layer& layer = w.layers[number];
        const long rows = to - from, width = s.width;
        float* x = p.x + from * width;
        for (long head = 0; head < s.heads; head++) {
            float scale[TILE];
            const T* query = p.queries + from * width + head * depth;
            const T* keys = p.keys[number % 2] + head * depth * padded();
            for (long key = 0; key < s.tokens; key += PANEL) {
                product(int(rows), query, width, keys + key * depth, depth, scratch.scores + key, padded());
            }
            for (long r = 0; r < rows; r++) {
                scale[r] = 1.0f / soften(scratch.scores + r * padded(), scratch.inner + r * padded());
            }
            for (long i = 0; i < depth; i += PANEL) {
                const T* values = p.values[number % 2] + (head * depth + i) * paired();
                product(int(rows), scratch.inner, padded(), values, s.tokens, scratch.sums, PANEL);
                for (long r = 0; r < rows; r++) {
                    T* attended = scratch.rows + r * width + head * depth + i;
                    put(attended, load(scratch.sums + r * PANEL) * scale[r]);
                    put(attended + LANES, load(scratch.sums + r * PANEL + LANES) * scale[r]);
                }
            }
        }
        add_bias(rows, layer.output_bias, x);
        add_product(rows, scratch.rows, width, layer.output, x, scratch);
        mlp(layer, rows, x, scratch);
    }

    // x + mlp(norm(x))
    void mlp(const Layer& layer, long rows, float* x, Scratch& scratch) const {
        const long width = s.width, inner = s.inner;
        for (long r = 0; r < rows; r++) {
            layer_norm(x + r * width, layer.norm2, layer.norm2_bias, scratch.rows + r * width);
        }
        for (long o = 0; o < inner; o += PANEL) {
            product(int(rows), scratch.rows, width, panel(layer.fc1, width, o / PANEL), width, scratch.sums, PANEL);
            const Vector left = load(layer.fc1_bias + o), right = load(layer.fc1_bias + o + LANES);
            for (long r = 0; r < rows; r++) {
                T* to = scratch.inner + r * inner + o;
                put(to, gelu(load(scratch.sums + r * PANEL) + left));
                put(to + LANES, gelu(load(scratch.sums + r * PANEL + LANES) + right));
            }
        }
        add_bias(rows, layer.fc2_bias, x);
        add_product(rows, scratch.inner, inner, layer.fc2, x, scratch);
    }

    // Scores of one query, in powers of two -> weights that add up to what is returned; zero for keys that nobody has.
    template <class To>
    float soften(float* scores, To* weights) const {
        const long whole = s.tokens / LANES * LANES;
        for (long i = s.tokens; i < up(s.tokens, LANES); i++) scores[i] = scores[0];
        Vector most = load(scores), total = {};
        for (long i = LANES; i < s.tokens; i += LANES) most = larger(most, load(scores + i));
        const float largest = reduce(most, larger);
        for (long i = 0; i < whole; i += LANES) {
            const Vector power = power_of_two(load(scores + i) - largest);
            total += power;
            put(weights + i, power);
        }
        float added = sum(total);
        if (whole < s.tokens) {
            float last[LANES];
            store(last, power_of_two(load(scores + whole) - largest));
            for (long i = s.tokens - whole; i < LANES; i++) last[i] = 0.0f;
            added += sum(load(last));
            put(weights + whole, load(last));
        }
        return added;
    }

    // The last block for CLS alone. By associativity its query goes through the keys' weights, q (W_k h) = (q W_k) h, and
    // the weighted sum is taken before the values' weights: neither keys nor values are formed.
    void cls(const Picture<T>& p, float* out, Scratch& scratch) const {
        const Layer& layer = w.layers[s.layers - 1];
        const long width = s.width;
        for (long t = 0; t < s.tokens; t++) {
            layer_norm(p.x + t * width, layer.norm1, layer.norm1_bias, scratch.normed + t * width);
        }
        layer_norm(p.x, layer.norm1, layer.norm1_bias, scratch.rows);
        float *query = scratch.one, *scores = query + s.heads * width;
        T* attended = scratch.all_heads;
        for (long o = 0; o < s.heads * width; o += PANEL) {
            product(1, scratch.rows, width, panel(w.to_scores, width, o / PANEL), width, query + o, PANEL);
        }
        for (long i = 0; i < s.heads * width; i += LANES) store(query + i, load(query + i) + load(w.to_scores_bias + i));
        for (long head = 0; head < s.heads; head++, query += width, attended += width) {
            for (long t = 0; t < s.tokens; t++) {
                Vector products = {};
                for (long i = 0; i < width; i += LANES) {
                    products += load(query + i) * load(scratch.normed + t * width + i);
                }
                scores[t] = sum(products);
            }
            const float scale = 1.0f / soften(scores, scores);
            for (long i = 0; i < width; i += LANES) {
                Vector added = {};
                for (long t = 0; t < s.tokens; t++) added += scores[t] * load(scratch.normed + t * width + i);
                put(attended + i, added * scale);
            }
        }
        add_bias(1, w.from_values_bias, p.x);
        add_product(1, scratch.all_heads, s.heads * width, w.from_values, p.x, scratch);
        mlp(layer, 1, p.x, scratch);
        rms_norm(p.x, out);
    }
};

}  // namespace

// Weights and pictures as `Shape`, `Weights` and `Encoder::run` have them. Returns the bytes of `work` that a picture
// takes, and does nothing else where there are no pictures.
extern "C" {

int encoder_panel() { return PANEL; }

size_t encode_float32(const Shape* shape, const Weights* weights, const void* pictures, int raw, long batch, long at_once,
                      int cls_only, char* work, float* out, int threads) {
    const Encoder<Float> encoder(*shape, *weights);
    if (batch > 0) encoder.run(pictures, raw, batch, at_once, cls_only, work, out, threads);
    return encoder.bytes_of_picture();
}

#if defined(__AVX512BF16__)
size_t encode_bfloat16(const Shape* shape, const Weights* weights, const void* pictures, int raw, long batch, long at_once,
                       int cls_only, char* work, float* out, int threads) {
    const Encoder<BFloat16> encoder(*shape, *weights);
    if (batch > 0) encoder.run(pictures, raw, batch, at_once, cls_only, work, out, threads);
    return encoder.bytes_of_picture();
}
#endif
}
