// A few tokens through the layers of a Llama-like Thinker whose cache holds the earlier ones; see compiled_layers.py.
//
// A small language model spends most of such a step between its products. Here, between products, threads only wait for each
// other. Weights are read in torch's own memory, row by row.
//
// Shapes: B rows of n new tokens, R = B n; T width, F width of the MLP, h heads of d in g groups, L tokens in all.

#include <cstring>

#include "vectors.h"

namespace {

constexpr int OUTPUTS = 4, TOKENS = LANES / 4;  // a product adds up so many sums at a time, in as many registers as there are lanes
constexpr int MOST = 128;  // rows at a time

constexpr float LOG2_E = 1.44269504f;

inline float dot(const float* a, const float* b, long width) {
    Vector total = {};
    for (long i = 0; i < width; i += LANES) total += load(a + i) * load(b + i);
    return sum(total);
}

template <int O, int R>
inline void corner(const float* w, const float* x, long width, float* y, long stride) {
    Vector sums[O][R] = {};
    for (long k = 0; k < width; k += LANES) {
#pragma GCC unroll 4
        for (int o = 0; o < O; o++) {
            const Vector weights = load(w + o * width + k);
#pragma GCC unroll 4
            for (int r = 0; r < R; r++) sums[o][r] += weights * load(x + r * width + k);
        }
    }
#pragma GCC unroll 4
    for (int o = 0; o < O; o++) {
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) y[r * stride + o] = sum(sums[o][r]);
    }
}

template <int O>
inline void edge(int tokens, const float* w, const float* x, long width, float* y, long stride) {
    switch (tokens) {
        case 1: return corner<O, 1>(w, x, width, y, stride);
        case 2: return corner<O, 2>(w, x, width, y, stride);
#if LANES == 16
        case 3: return corner<O, 3>(w, x, width, y, stride);
        case 4: return corner<O, 4>(w, x, width, y, stride);
#endif
    }
}

// y[R, 0..OUTPUTS] = x[R, K] w[0..OUTPUTS, K]^T + bias
inline void outputs(long rows, const float* w, const float* bias, const float* x, long width, float* y, long stride) {
    for (long r = 0; r < rows; r += TOKENS) {
        edge<OUTPUTS>(int(rows - r < TOKENS ? rows - r : TOKENS), w, x + r * width, width, y + r * stride, stride);
    }
    for (long r = 0; bias && r < rows; r++) {
        for (int o = 0; o < OUTPUTS; o++) y[r * stride + o] += bias[o];
    }
}

inline void rms_norm(const float* x, const float* weight, long width, float epsilon, float* out) {
    const float scale = 1.0f / __builtin_sqrtf(dot(x, x, width) / width + epsilon);
    for (long i = 0; i < width; i += LANES) store(out + i, load(x + i) * scale * load(weight + i));
}

}  // namespace

extern "C" {

// The order of the weights from compiled_layers.py.
struct Shape {
    long batch, tokens, width, inner, heads, groups, depth, layers, held;
    float epsilon, head_epsilon, scaling;
};

struct Layer {
    const float *input_norm, *query, *query_bias, *key, *key_bias, *value, *value_bias, *query_norm, *key_norm;
    const float *output, *output_bias, *mlp_norm, *gate, *gate_bias, *up, *up_bias, *down, *down_bias;
};

int layers_multiple() { return LANES; }

// x: float[R, T], becomes the last hidden state. cosines, sines: float[R, d]; sines of the first half have the opposite sign.
// seen: bool[B, L] or null for all. caches: for each layer keys and values, float[B, g, room, d]. work: float[R, 2 h d + 2 g d
// + F], and for each thread float[R, T] and float[L], with room for a whole vector at the end.
void run_layers(const Shape* shape, const float* const* weights, float* x, const float* cosines, const float* sines,
                const uint8_t* seen, float* const* caches, const long* rooms, float* work, int threads) {
    const Layer* layers = reinterpret_cast<const Layer*>(weights);  // one pointer after the other
    const float* norm = *reinterpret_cast<const float* const*>(layers + shape->layers);
    const Shape s = *shape;
    const long rows = s.batch * s.tokens, all_heads = s.heads * s.depth, all_groups = s.groups * s.depth;
    const long projected = all_heads + 2 * all_groups, length = s.held + s.tokens, padded = (length + LANES - 1) / LANES * LANES;
    float *qkv = work, *attended = qkv + rows * projected, *inner = attended + rows * all_heads;
    float* own = inner + rows * s.inner;
#pragma omp parallel num_threads(threads)
    {
        float *normed = nullptr, *scores = nullptr;
#pragma omp critical
        {
            normed = own;
            scores = own + rows * s.width;
            own = scores + padded;
        }
        for (long number = 0; number < s.layers; number++) {
            const Layer& layer = layers[number];
            float *keys = caches[2 * number], *values = caches[2 * number + 1];
            const long room = rooms[number];
            for (long r = 0; r < rows; r++) {
                rms_norm(x + r * s.width, layer.input_norm, s.width, s.epsilon, normed + r * s.width);
            }
#pragma omp for
            for (long o = 0; o < projected; o += OUTPUTS) {
                const bool is_query = o < all_heads, is_key = !is_query && o < all_heads + all_groups;
                const float* matrix = is_query ? layer.query : is_key ? layer.key : layer.value;
                const float* bias = is_query ? layer.query_bias : is_key ? layer.key_bias : layer.value_bias;
                const long row = is_query ? o : is_key ? o - all_heads : o - all_heads - all_groups;
                outputs(rows, matrix + row * s.width, bias ? bias + row : nullptr, normed, s.width, qkv + o, projected);
            }
#pragma omp for
            for (long task = 0; task < rows * (s.heads + 2 * s.groups); task++) {
                const long r = task / (s.heads + 2 * s.groups), head = task % (s.heads + 2 * s.groups);
                float* one = qkv + r * projected + head * s.depth;
                const long place = r / s.tokens * s.groups * room + s.held + r % s.tokens;
                if (head >= s.heads + s.groups) {
                    float* value = values + (place + (head - s.heads - s.groups) * room) * s.depth;
                    std::memcpy(value, one, 4 * s.depth);
                    continue;
                }
                const float* weight = head < s.heads ? layer.query_norm : layer.key_norm;
                if (weight) rms_norm(one, weight, s.depth, s.head_epsilon, one);
                const float *cosine = cosines + r * s.depth, *sine = sines + r * s.depth;
                for (long i = 0; i < s.depth / 2; i++) {
                    const float first = one[i], second = one[s.depth / 2 + i];
                    one[i] = first * cosine[i] + second * sine[i];
                    one[s.depth / 2 + i] = second * cosine[s.depth / 2 + i] + first * sine[s.depth / 2 + i];
                }
                if (head >= s.heads) {
                    std::memcpy(keys + (place + (head - s.heads) * room) * s.depth, one, 4 * s.depth);
                }
            }
#pragma omp for
            for (long task = 0; task < rows * s.heads; task++) {
                const long r = task / s.heads, head = task % s.heads, b = r / s.tokens;
                const long first = (b * s.groups + head / (s.heads / s.groups)) * room, there = s.held + r % s.tokens + 1;
                const float* query = qkv + r * projected + head * s.depth;
                const uint8_t* visible = seen ? seen + b * length : nullptr;
                float largest = -3e38f;
                for (long t = 0; t < there; t++) {  // padding sees itself, since the average of nothing is not a number
                    const bool hidden = visible && !visible[t] && t != there - 1;
                    scores[t] = hidden ? -3e38f : dot(query, keys + (first + t) * s.depth, s.depth) * (s.scaling * LOG2_E);
                    largest = scores[t] > largest ? scores[t] : largest;
                }
                for (long t = there; t < padded; t++) scores[t] = -3e38f;
                float total = 0.0f;
                for (long t = 0; t < there; t += LANES) {
                    Vector weights = power_of_two(load(scores + t) - largest);
                    weights = load(scores + t) < -1e38f ? Vector{} : weights;  // NaN is not hidden
                    store(scores + t, weights);
                    total += sum(weights);
                }
                for (long i = 0; i < s.depth; i += LANES) {
                    Vector read = {};
                    for (long t = 0; t < there; t++) read += scores[t] * load(values + (first + t) * s.depth + i);
                    store(attended + r * all_heads + head * s.depth + i, read * (1.0f / total));
                }
            }
#pragma omp for
            for (long o = 0; o < s.width; o += OUTPUTS) {
                const float* bias = layer.output_bias ? layer.output_bias + o : nullptr;
                float sums[MOST * OUTPUTS];
                outputs(rows, layer.output + o * all_heads, bias, attended, all_heads, sums, OUTPUTS);
                for (long r = 0; r < rows; r++) {
                    for (int i = 0; i < OUTPUTS; i++) x[r * s.width + o + i] += sums[r * OUTPUTS + i];
                }
            }
            for (long r = 0; r < rows; r++) {
                rms_norm(x + r * s.width, layer.mlp_norm, s.width, s.epsilon, normed + r * s.width);
            }
#pragma omp for
            for (long o = 0; o < s.inner; o += LANES) {
                float gates[MOST * LANES], ups[MOST * LANES];
                for (long i = 0; i < LANES; i += OUTPUTS) {
                    const long row = o + i;
                    const float* gate_bias = layer.gate_bias ? layer.gate_bias + row : nullptr;
                    const float* up_bias = layer.up_bias ? layer.up_bias + row : nullptr;
                    outputs(rows, layer.gate + row * s.width, gate_bias, normed, s.width, gates + i, LANES);
                    outputs(rows, layer.up + row * s.width, up_bias, normed, s.width, ups + i, LANES);
                }
                for (long r = 0; r < rows; r++) {  // silu(gate) * up
                    const Vector gate = load(gates + r * LANES);
                    const Vector opened = gate / (1.0f + power_of_two(gate * -LOG2_E));
                    store(inner + r * s.inner + o, opened * load(ups + r * LANES));
                }
            }
#pragma omp for
            for (long o = 0; o < s.width; o += OUTPUTS) {
                const float* bias = layer.down_bias ? layer.down_bias + o : nullptr;
                float sums[MOST * OUTPUTS];
                outputs(rows, layer.down + o * s.inner, bias, inner, s.inner, sums, OUTPUTS);
                for (long r = 0; r < rows; r++) {
                    for (int i = 0; i < OUTPUTS; i++) x[r * s.width + o + i] += sums[r * OUTPUTS + i];
                }
            }
        }
#pragma omp for
        for (long r = 0; r < rows; r++) rms_norm(x + r * s.width, norm, s.width, s.epsilon, x + r * s.width);
    }
}
}
