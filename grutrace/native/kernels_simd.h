/* The functions of one instruction set. Included by kernels.c, with ISA and LANES defined. */

/* Copy rows of `size` bytes. Aligned rows bypass the cache: they are read much later, if at all, and
 * the layer's weights stay in the cache. */
static void WITH_ISA(copy_rows)(char *target, int64_t target_stride, const char *source,
                                int64_t source_stride, int64_t rows, int64_t size) {
#if defined(__AVX2__)
    int is_aligned = ((uintptr_t)target | (uintptr_t)target_stride | (uintptr_t)size) % 32 == 0;
    if (is_aligned && size >= 64) {
        for (int64_t row = 0; row < rows; row++) {
            const char *from = source + row * source_stride;
            char *to = target + row * target_stride;
            for (int64_t i = 0; i < size; i += 32) {
                __m256i value = _mm256_loadu_si256((const __m256i *)(from + i));
                _mm256_stream_si256((__m256i *)(to + i), value);
            }
        }
        return;
    }
#endif
    for (int64_t row = 0; row < rows; row++) {
        memcpy(target + row * target_stride, source + row * source_stride, (size_t)size);
    }
}

#define REAL float
#define INTEGER int32_t
#define MAGNITUDE INT32_MAX
/* Without an instruction that shifts each value by its own number, few bins take as long as many. */
#if defined(__AVX2__)
#define FEW_BINS 32
#else
#define FEW_BINS 0
#endif
#if LANES == 16
#define MAXIMUM(a, b) _mm512_max_ps((__m512)(a), (__m512)(b))
#define MINIMUM(a, b) _mm512_min_ps((__m512)(a), (__m512)(b))
#elif LANES == 8
#define MAXIMUM(a, b) _mm256_max_ps((__m256)(a), (__m256)(b))
#define MINIMUM(a, b) _mm256_min_ps((__m256)(a), (__m256)(b))
#endif
#define TYPED(name) CONCATENATE(CONCATENATE(name, f32), ISA)
#include "kernels_typed.h"
#undef REAL
#undef INTEGER
#undef MAGNITUDE
#undef FEW_BINS
#undef MAXIMUM
#undef MINIMUM
#undef TYPED

#define REAL double
#define INTEGER int64_t
#define MAGNITUDE INT64_MAX
#define FEW_BINS 0
#define TYPED(name) CONCATENATE(CONCATENATE(name, f64), ISA)
#include "kernels_typed.h"
#undef REAL
#undef INTEGER
#undef MAGNITUDE
#undef FEW_BINS
#undef TYPED

#define REALS CONCATENATE(reals_f32, ISA)
#define INTEGERS CONCATENATE(integers_f32, ISA)
#define LOAD CONCATENATE(load_f32, ISA)
#define SELECT CONCATENATE(select_f32, ISA)
#define ABSOLUTE CONCATENATE(absolute_f32, ISA)
#define LARGER CONCATENATE(larger_f32, ISA)
#define SMALLER CONCATENATE(smaller_f32, ISA)

/* e to the power of each value. Values are limited to -87.9 to 87.9, and the result below -87.3 is 0.
 * Range reduction and polynomial of expf in the Cephes library (Moshier, 1989). */
static inline REALS WITH_ISA(exponential)(REALS x) {
    const float limit = 87.9f, shifter = 12582912.0f; /* 1.5 * 2^23: adding it rounds. */
    REALS zeros = {0};
    x = SMALLER(LARGER(x, zeros - limit), zeros + limit);
    REALS n = (x * 1.44269504088896341f + shifter) - shifter;
    REALS r = x - n * 0.693359375f + n * 2.12194440e-4f;
    REALS p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    /* 1 + r + p r^2, with the rounding error of 1 + r. */
    REALS sum = 1.0f + r;
    p = sum + ((r - (sum - 1.0f)) + p * (r * r));
    /* A NaN stays in p. */
    INTEGERS power = __builtin_convertvector(SELECT(n == n, n, zeros), INTEGERS);
    return p * (REALS)((power + 127) << 23);
}

/* 1 / (1 + e^-x), corrected for the rounding error of the sum. */
static inline REALS WITH_ISA(sigmoid)(REALS x) {
    REALS e = WITH_ISA(exponential)(-x);
    REALS sum = 1.0f + e, rest = sum - 1.0f;
    REALS lost = (1.0f - (sum - rest)) + (e - rest);
    REALS inverse = 1.0f / sum;
    return inverse - inverse * inverse * lost;
}

/* Polynomial of tanhf in the Cephes library near 0, and 1 - 2 / (e^2x + 1) elsewhere. */
static inline REALS WITH_ISA(tanh)(REALS x) {
    REALS size = ABSOLUTE(x), z = x * x;
    REALS p = z * -5.70498872745e-3f + 2.06390887954e-2f;
    p = p * z - 5.37397155531e-2f;
    p = p * z + 1.33314422036e-1f;
    p = p * z - 3.33332819422e-1f;
    REALS near = p * z * x + x;
    REALS far = 1.0f - 2.0f / (WITH_ISA(exponential)(size + size) + 1.0f);
    far = SELECT(x < 0, -far, far);
    return SELECT(size < 0.625f, near, far);
}

/* Compute LANES units of one row of a held step. The pointers are those of the first unit. */
static inline void WITH_ISA(held_lanes)(const float *input, float *product, const float *before,
                                        float *state, int64_t units, const int32_t *const *masks,
                                        const float *const *values) {
    REALS gates[4], previous = LOAD(before);
    for (int gate = 0; gate < 4; gate++) {
        REALS value;
        if (gate < 2) {
            value = WITH_ISA(sigmoid)(LOAD(input + gate * units) + LOAD(product + gate * units));
        } else if (gate == 2) {
            REALS recurrent = LOAD(product + 2 * units) * gates[0];
            value = WITH_ISA(tanh)(LOAD(input + 2 * units) + recurrent);
        } else {
            value = (previous - gates[2]) * gates[1] + gates[2];
        }
        if (masks[gate] != NULL) {
            INTEGERS mask;
            memcpy(&mask, masks[gate], sizeof mask);
            value = SELECT(mask, LOAD(values[gate]), value);
        }
        gates[gate] = value;
    }
    for (int gate = 0; gate < 3; gate++) {
        memcpy(product + gate * units, gates + gate, sizeof(REALS));
    }
    memcpy(state, gates + 3, sizeof(REALS));
}

/* Compute the last `lanes` units of a row, fewer than LANES. */
static void WITH_ISA(held_rest)(const float *input, float *product, const float *before,
                                float *state, int64_t units, const int32_t *const *masks,
                                const float *const *values, int64_t lanes) {
    float products[2][3 * LANES] = {{0}}, states[2][LANES] = {{0}}, own_values[4][LANES] = {{0}};
    int32_t own_masks[4][LANES] = {{0}};
    const int32_t *mask_rows[4];
    const float *value_rows[4];
    size_t size = (size_t)lanes * sizeof(float);
    for (int64_t gate = 0; gate < 3; gate++) {
        memcpy(products[0] + gate * LANES, input + gate * units, size);
        memcpy(products[1] + gate * LANES, product + gate * units, size);
    }
    for (int gate = 0; gate < 4; gate++) {
        mask_rows[gate] = masks[gate] == NULL ? NULL : own_masks[gate];
        value_rows[gate] = own_values[gate];
        if (masks[gate] != NULL) {
            memcpy(own_masks[gate], masks[gate], size);
            memcpy(own_values[gate], values[gate], size);
        }
    }
    memcpy(states[0], before, size);
    WITH_ISA(held_lanes)(products[0], products[1], states[0], states[1], LANES, mask_rows, value_rows);
    for (int64_t gate = 0; gate < 3; gate++) {
        memcpy(product + gate * units, products[1] + gate * LANES, size);
    }
    memcpy(state, states[1], size);
}

static void WITH_ISA(held_step)(const held_step *step, const float *input, float *output) {
    int64_t units = step->units;
    for (int64_t row = 0; row < step->batch; row++) {
        const float *own_input = input + row * 3 * units;
        float *product = step->product + row * 3 * units;
        float *state = step->state + row * units;
        for (int64_t u = 0; u < units; u += LANES) {
            const int32_t *masks[4];
            const float *values[4];
            for (int gate = 0; gate < 4; gate++) {
                masks[gate] = step->masks[gate] == NULL ? NULL : step->masks[gate] + u;
                values[gate] = step->values[gate] == NULL ? NULL : step->values[gate] + u;
            }
            if (u + LANES <= units) {
                WITH_ISA(held_lanes)(own_input + u, product + u, state + u, state + u, units, masks,
                                     values);
            } else {
                WITH_ISA(held_rest)(own_input + u, product + u, state + u, state + u, units, masks,
                                    values, units - u);
            }
        }
        memcpy(output + row * units, state, (size_t)units * sizeof(float));
    }
}

/* The largest values and the sum of the check, for LANES units. */
typedef struct {
    REALS off, products, recurrent, sum;
} WITH_ISA(extremes);

static inline void WITH_ISA(replay_lanes)(const float *input, const float *product,
                                          const float *before, const float *state, REALS *gates,
                                          int64_t units, WITH_ISA(extremes) *extremes) {
    REALS ir = LOAD(input), iz = LOAD(input + units), in = LOAD(input + 2 * units);
    REALS hr = LOAD(product), hz = LOAD(product + units), hn = LOAD(product + 2 * units);
    REALS previous = LOAD(before);
    REALS reset = WITH_ISA(sigmoid)(ir + hr), update = WITH_ISA(sigmoid)(iz + hz);
    REALS candidate = WITH_ISA(tanh)(in + hn * reset);
    REALS off = ABSOLUTE((previous - candidate) * update + candidate - LOAD(state));
    REALS recurrent = ABSOLUTE(hn);
    REALS products = LARGER(ABSOLUTE(ir), ABSOLUTE(iz));
    products = LARGER(products, ABSOLUTE(in));
    products = LARGER(products, ABSOLUTE(hr));
    products = LARGER(products, ABSOLUTE(hz));
    products = LARGER(products, recurrent);
    extremes->off = LARGER(extremes->off, off);
    extremes->products = LARGER(extremes->products, products);
    extremes->recurrent = LARGER(extremes->recurrent, recurrent);
    /* A NaN or an infinity anywhere stays in the sum. */
    extremes->sum += off + (ABSOLUTE(ir + hr) + ABSOLUTE(iz + hz) + ABSOLUTE(in + hn));
    gates[0] = reset;
    gates[1] = update;
    gates[2] = candidate;
}

/* Compute the last `lanes` units of a row, fewer than LANES, padded with zeros, whose new state is 0. */
static void WITH_ISA(replay_rest)(const replay_block *block, const float *input,
                                  const float *product, const float *before, const float *state,
                                  int64_t at, int64_t lanes, WITH_ISA(extremes) *extremes) {
    float products[2][3 * LANES] = {{0}}, states[2][LANES] = {{0}};
    size_t size = (size_t)lanes * sizeof(float);
    REALS gates[3];
    for (int64_t gate = 0; gate < 3; gate++) {
        memcpy(products[0] + gate * LANES, input + gate * block->units, size);
        memcpy(products[1] + gate * LANES, product + gate * block->units, size);
    }
    memcpy(states[0], before, size);
    memcpy(states[1], state, size);
    WITH_ISA(replay_lanes)(products[0], products[1], states[0], states[1], gates, LANES, extremes);
    for (int gate = 0; gate < 3; gate++) {
        if (block->gates[gate] != NULL) {
            memcpy(block->gates[gate] + at, gates + gate, size);
        }
    }
}

static int WITH_ISA(replay)(const replay_block *block) {
    int64_t units = block->units;
    int is_finite = 1;
    WITH_ISA(extremes) extremes = {{0}, {0}, {0}, {0}};
    double *check = block->checks;
    for (int64_t i = 0; i < block->steps; i++) {
        for (int64_t j = 0; j < block->batch; j++) {
            int64_t row = (i * block->batch + j) * 3 * units;
            const float *input = block->input + row, *product = block->product + row;
            const float *before =
                block->previous + i * block->previous_strides[0] + j * block->previous_strides[1];
            const float *state =
                block->states + i * block->state_strides[0] + j * block->state_strides[1];
            int64_t at = i * block->gate_strides[0] + j * block->gate_strides[1];
            int64_t u = 0;
            for (; u + LANES <= units; u += LANES) {
                REALS gates[3];
                WITH_ISA(replay_lanes)(input + u, product + u, before + u, state + u, gates, units,
                                       &extremes);
                for (int gate = 0; gate < 3; gate++) {
                    if (block->gates[gate] != NULL) {
                        memcpy(block->gates[gate] + at + u, gates + gate, sizeof(REALS));
                    }
                }
            }
            if (u < units) {
                WITH_ISA(replay_rest)(block, input + u, product + u, before + u, state + u, at + u,
                                      units - u, &extremes);
            }
            int is_last = i == block->steps - 1 && j == block->batch - 1;
            if (block->grouping == 2 || is_last ||
                (block->grouping == 1 && j == block->batch - 1)) {
                float off = 0, products = 0, recurrent = 0, sum = 0;
                for (int k = 0; k < LANES; k++) {
                    off = extremes.off[k] > off ? extremes.off[k] : off;
                    products = extremes.products[k] > products ? extremes.products[k] : products;
                    recurrent = extremes.recurrent[k] > recurrent ? extremes.recurrent[k] : recurrent;
                    sum += extremes.sum[k];
                }
                check[0] = isfinite(sum) ? off : (double)NAN;
                check[1] = products;
                check[2] = recurrent;
                is_finite &= isfinite(sum) != 0;
                check += 3;
                memset(&extremes, 0, sizeof extremes);
            }
        }
    }
    return is_finite;
}

#undef REALS
#undef INTEGERS
#undef LOAD
#undef SELECT
#undef ABSOLUTE
#undef LARGER
#undef SMALLER

#include "kernels_directions.h"

static const function_table WITH_ISA(table) = {
    WITH_ISA(copy_rows),
    CONCATENATE(states_f32, ISA),
    CONCATENATE(states_f64, ISA),
    CONCATENATE(count_f32, ISA),
    CONCATENATE(count_f64, ISA),
    WITH_ISA(replay),
    WITH_ISA(held_step),
    WITH_ISA(directions),
};
