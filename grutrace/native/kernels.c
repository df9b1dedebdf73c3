/* Loops over the bytes of a call: copy the kernel's gates, check them, count them.
 *
 * Plain C without headers of Python or torch. The functions are called by address (see library.py),
 * so one library serves every version of Python. `kernels_simd.h` is compiled once per instruction
 * set, and `grutrace_select` chooses one when the library is loaded.
 *
 * No operation is contracted (-ffp-contract=off), and no element depends on its position. So the
 * result of each element has the same bits with every instruction set.
 */
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define EXPORT __attribute__((visibility("default")))

/* Statistics of one unit: grutrace.statistics.moments.UNIT_DTYPE. */
typedef struct {
    int64_t count, nan, infinite;
    double mean, squares, minimum, maximum;
    int64_t below, above, underflow, overflow;
} unit_stats;

/* How values are counted. */
typedef struct {
    /* Bins: a power of two up to MOST_BINS, or 0 for no histogram. Edges: exact. */
    int64_t bins;
    double low, high;
    /* Bounds of the shares. */
    double below, above;
    int64_t shares, moments;
    /* For each unit, the sums of third and fourth powers of the deviations from the mean; NULL if they
     * are not requested. They need the moments. */
    double *cubes, *fourths;
} count_options;

enum { MOST_BINS = 1024 };

/* The source and the target of one gate copy. Lengths are in elements. */
typedef struct {
    /* In the kernel's memory: stride from one row to the next; offset of the first unit from the
     * address of the step; stride from one unit to the next; number of units; bytes of an element. */
    int64_t row_stride, offset, unit_step, units, itemsize;
    /* In the copy: the first row of the first step; stride from one row of a step to the next. */
    char *target;
    int64_t target_row_stride;
    /* Stride from one step to the next. A packed batch has an offset for each step instead. */
    int64_t target_step_stride;
    const int64_t *target_offsets;
} gate_copy;

/* The copies of a call. Each direction, in the order of execution, has `product_count` copies of reset
 * and update and `candidate_count` copies of the candidate. */
typedef struct {
    const gate_copy *product, *candidate;
    int64_t product_count, candidate_count;
    /* Number of rows of each step of a direction. */
    const int64_t *rows;
    int64_t steps;
    /* Number of steps that have started, in all directions. */
    int64_t step;
    /* Address of the previous step's sum. The kernel has replaced this sum by the candidate. */
    const char *sum;
} copy_plan;

/* Steps whose gates are computed from their products: `steps` by `batch` rows. */
typedef struct {
    /* (steps, batch, 3 * units): the products of the input and of the previous state, each for reset,
     * update and candidate. */
    const float *input, *product;
    /* The states before and after, with their strides over steps and batch in elements. */
    const float *previous, *states;
    int64_t previous_strides[2], state_strides[2];
    /* Memory for reset, update and candidate; NULL for a gate that is not requested. */
    float *gates[3];
    int64_t gate_strides[2];
    int64_t steps, batch, units;
    /* Rows that share a check: 0 all rows, 1 the rows of a step, 2 each row separately. */
    int64_t grouping;
    /* (groups, 3): the largest difference between the states and the states computed from the gates,
     * NaN if a value is not finite; the largest element of the products; the largest element of the
     * recurrent product of the candidate. */
    double *checks;
} replay_block;

/* Memory that is reused by the steps of a layer whose gates are held at some units. */
typedef struct {
    /* (batch, 3 * units): the product of the previous state. Reset, update and candidate replace it. */
    float *product;
    /* (batch, units): the previous state. The new state replaces it. */
    float *state;
    /* For reset, update, candidate and state, (units,): a mask with all bits set for held units, and
     * the values. NULL for a quantity that is not held. */
    const int32_t *masks[4];
    const float *values[4];
    int64_t batch, units;
} held_step;

/* Memory for similar calls of one step, one after another. Sizes are in bytes. */
typedef struct {
    /* For each call, (batch, width): the input, the states before and after, and reset, update and
     * candidate. A gate that is not requested is NULL; update and candidate are requested together. */
    char *input, *initial, *final, *gates[3];
    int64_t input_size, state_size, batch, units, itemsize;
    /* For each call, the largest difference between the states and the states computed from the gates;
     * NaN if a value is not finite. */
    double *residuals;
} call_series;

/* Steps of one sequence, along which directions are multiplied by the Jacobian of each step. */
typedef struct {
    /* (3, units, units): the recurrent weights of reset, update and candidate. */
    const double *weights;
    /* (steps, units): the factors of the identity and of the weights' rows. */
    const double *keep, *gates[3];
    /* (units, columns): the directions, orthonormal before and after. Only `count` columns are used; the
     * others are zero. `columns` is a multiple of DIRECTION_GROUP. */
    double *directions;
    /* (count,): the logarithms of their growth are added. */
    double *logs;
    /* Memory for 2 * units * columns + DIRECTION_GROUP * units + 2 * columns elements. */
    double *memory;
    int64_t steps, units, columns, count;
    /* Steps until the directions are made orthonormal. `longest` is its largest value, or 0 to leave it as
     * it is. */
    int64_t interval, longest;
    /* Log ratio of the largest to the smallest growth: to aim at, and not to exceed. */
    double spread, most_spread;
} direction_steps;

/* Columns that are multiplied together. */
enum { DIRECTION_GROUP = 8 };

/* The kind of a call's initial states: copied, zeros, or the final states of the previous call. See
 * grutrace.capture.sequences.assignment.InitialState. */
enum { OWN_STATE = 0, ZERO_STATE = 1, CHAINED_STATE = 2 };

typedef struct {
    void (*copy_rows)(char *, int64_t, const char *, int64_t, int64_t, int64_t);
    double (*states_f32)(const float *, const float *, const float *, int64_t, int64_t,
                         const float *, float *, int64_t, int64_t, int64_t, int64_t);
    double (*states_f64)(const double *, const double *, const double *, int64_t, int64_t,
                         const double *, double *, int64_t, int64_t, int64_t, int64_t);
    void (*count_f32)(const float *, int64_t, int64_t, unit_stats *, int64_t *,
                      const count_options *);
    void (*count_f64)(const double *, int64_t, int64_t, unit_stats *, int64_t *,
                      const count_options *);
    int (*replay)(const replay_block *);
    void (*held_step)(const held_step *, const float *, float *);
    int (*directions)(direction_steps *);
} function_table;

#define CONCATENATE_(a, b) a##_##b
#define CONCATENATE(a, b) CONCATENATE_(a, b)
#define WITH_ISA(name) CONCATENATE(name, ISA)

#define ISA portable
#define LANES 4
#include "kernels_simd.h"
#undef ISA
#undef LANES

#if defined(__x86_64__)
#define ISA avx2
#define LANES 8
#pragma GCC push_options
#pragma GCC target("avx2")
#include "kernels_simd.h"
#pragma GCC pop_options
#undef ISA
#undef LANES

#define ISA avx512
#define LANES 16
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#include "kernels_simd.h"
#pragma GCC pop_options
#undef ISA
#undef LANES
#endif

static const function_table *functions = &table_portable;

/* Choose an instruction set by its name; NULL for the best one of this processor. Returns the name of
 * the chosen instruction set, or NULL if this processor or this build lacks the requested one. */
EXPORT const char *grutrace_select(const char *name) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    int has_avx2 = __builtin_cpu_supports("avx2") != 0;
    int has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                     __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (has_avx512 && (name == NULL || strcmp(name, "avx512") == 0)) {
        functions = &table_avx512;
        return "avx512";
    }
    if (has_avx2 && (name == NULL || strcmp(name, "avx2") == 0)) {
        functions = &table_avx2;
        return "avx2";
    }
#endif
#if defined(__aarch64__)
    /* Every processor of this kind has it, so the compiler always uses it. */
    const char *common = "neon";
#else
    const char *common = "portable";
#endif
    if (name == NULL || strcmp(name, common) == 0) {
        functions = &table_portable;
        return common;
    }
    return NULL;
}

static void copy_gates(const gate_copy *copies, int64_t count, const char *source, int64_t step,
                       int64_t rows) {
    for (const gate_copy *c = copies; c < copies + count; c++) {
        int64_t start = c->target_offsets ? c->target_offsets[step] : step * c->target_step_stride;
        int64_t size = c->itemsize;
        char *target = c->target + start * size;
        const char *from = source + c->offset * size;
        if (c->unit_step == 1) {
            functions->copy_rows(target, c->target_row_stride * size, from, c->row_stride * size,
                                 rows, c->units * size);
            continue;
        }
        for (int64_t row = 0; row < rows; row++) {
            for (int64_t unit = 0; unit < c->units; unit++) {
                memcpy(target + (row * c->target_row_stride + unit) * size,
                       from + (row * c->row_stride + unit * c->unit_step) * size, (size_t)size);
            }
        }
    }
}

/* Copy the candidate of the previous step, and reset and update of this step. `product` is NULL after
 * the last step. */
EXPORT void grutrace_copy_step(copy_plan *plan, const char *product, const char *sum) {
    if (plan->sum != NULL) {
        int64_t direction = (plan->step - 1) / plan->steps, step = (plan->step - 1) % plan->steps;
        copy_gates(plan->candidate + direction * plan->candidate_count, plan->candidate_count,
                   plan->sum, step, plan->rows[direction * plan->steps + step]);
    }
    if (product != NULL) {
        int64_t direction = plan->step / plan->steps, step = plan->step % plan->steps;
        copy_gates(plan->product + direction * plan->product_count, plan->product_count, product,
                   step, plan->rows[direction * plan->steps + step]);
        plan->step += 1;
    }
    plan->sum = sum;
#if defined(__x86_64__)
    /* Other threads read the rows. */
    if (product == NULL) {
        _mm_sfence();
    }
#endif
}

/* Copy the states of a padded call to the rows of a trace, if `rows` is not NULL. Return the largest
 * difference from the states computed from the gates; NaN if a value is not finite.
 *
 * update, candidate, rows: (batch, steps, units). hidden: `steps` by `batch` rows of `units`, with the
 * given strides in elements. initial: (batch, units). */
EXPORT double grutrace_states_f32(const float *update, const float *candidate, const float *hidden,
                                  int64_t step_stride, int64_t batch_stride, const float *initial,
                                  float *rows, int64_t steps, int64_t batch, int64_t units,
                                  int64_t reverse) {
    return functions->states_f32(update, candidate, hidden, step_stride, batch_stride, initial,
                                 rows, steps, batch, units, reverse);
}

EXPORT double grutrace_states_f64(const double *update, const double *candidate,
                                  const double *hidden, int64_t step_stride, int64_t batch_stride,
                                  const double *initial, double *rows, int64_t steps,
                                  int64_t batch, int64_t units, int64_t reverse) {
    return functions->states_f64(update, candidate, hidden, step_stride, batch_stride, initial,
                                 rows, steps, batch, units, reverse);
}

static int is_zero(const char *bytes, int64_t size) {
    return size == 0 || (bytes[0] == 0 && memcmp(bytes, bytes + 1, (size_t)size - 1) == 0);
}

/* Copy a call of one step to its position in a series, and return the kind of its initial states.
 *
 * `input`, `state` and `output` are contiguous; NULL for a tensor that is already in the series.
 * `product` is the last third of the kernel's hidden product, whose first two thirds hold reset and
 * update. `candidate` is contiguous. Both are NULL if no gate is requested. */
EXPORT int64_t grutrace_add_call(const call_series *series, int64_t number, const char *input,
                                 const char *state, const char *output, const char *product,
                                 const char *candidate) {
    size_t state_size = (size_t)series->state_size;
    char *initial = series->initial + number * series->state_size;
    char *final = series->final + number * series->state_size;
    const char *before = initial;
    int64_t kind = OWN_STATE;
    if (input != NULL) {
        memcpy(series->input + number * series->input_size, input, (size_t)series->input_size);
    }
    if (output != NULL) {
        memcpy(final, output, state_size);
    }
    if (state != NULL) {
        before = state;
        if (number > 0 && memcmp(state, final - state_size, state_size) == 0) {
            kind = CHAINED_STATE;
        } else if (is_zero(state, series->state_size)) {
            kind = ZERO_STATE;
        } else {
            memcpy(initial, state, state_size);
        }
    }
    if (product == NULL) {
        return kind;
    }
    int64_t row = series->units * series->itemsize, offset = number * series->state_size;
    for (int gate = 0; gate < 3; gate++) {
        char *target = series->gates[gate];
        if (target == NULL) {
            continue;
        }
        target += offset;
        if (gate == 2) {
            memcpy(target, candidate, state_size);
            continue;
        }
        const char *source = product + (gate - 2) * row;
        for (int64_t b = 0; b < series->batch; b++) {
            memcpy(target + b * row, source + b * 3 * row, (size_t)row);
        }
    }
    const void *update = series->gates[1] + offset, *own = series->gates[2] + offset;
    series->residuals[number] =
        series->itemsize == 8
            ? functions->states_f64(update, own, (double *)final, 0, series->units,
                                    (const double *)before, NULL, 1, series->batch, series->units, 0)
            : functions->states_f32(update, own, (float *)final, 0, series->units,
                                    (const float *)before, NULL, 1, series->batch, series->units, 0);
    return kind;
}

/* Count `rows` by `width` contiguous values into the statistics of `width` units, and into
 * (width, bins) histograms. */
EXPORT void grutrace_count_f32(const float *values, int64_t rows, int64_t width, unit_stats *units,
                               int64_t *histogram, const count_options *options) {
    functions->count_f32(values, rows, width, units, histogram, options);
}

EXPORT void grutrace_count_f64(const double *values, int64_t rows, int64_t width,
                               unit_stats *units, int64_t *histogram,
                               const count_options *options) {
    functions->count_f64(values, rows, width, units, histogram, options);
}

/* Compute gates and checks from products. Return whether all values are finite. */
EXPORT int64_t grutrace_replay(const replay_block *block) { return functions->replay(block); }

/* Compute one step from its products: the product of the input, (batch, 3 * units), and the product in
 * `step`. The new state is also copied to `output`, (batch, units). */
EXPORT void grutrace_held_step(const held_step *step, const float *input, float *output) {
    functions->held_step(step, input, output);
}

/* Multiply directions by Jacobians. Return 0 if a growth is too small or too large for its square, or not
 * finite: then the directions and the logarithms are those of some step between. */
EXPORT int64_t grutrace_directions(direction_steps *steps) { return functions->directions(steps); }
