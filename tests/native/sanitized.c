/* Calls every function of the library with each instruction set, for the sanitizers. With an argument it
 * is wrong on purpose. */
#include <stdio.h>
#include <stdlib.h>

#include "kernels.c"

/* Exactly as much memory as is used, so that one element too many is an error. */
static void *filled(int64_t count, size_t itemsize, double scale) {
    unsigned char *memory = malloc((size_t)count * itemsize + (count == 0));
    for (int64_t i = 0; i < count; i++) {
        double value = scale * sin((double)(i * i % 1009) + 0.5);
        float narrow = (float)value;
        memcpy(memory + (size_t)i * itemsize, itemsize == 8 ? (void *)&value : (void *)&narrow,
               itemsize);
    }
    return memory;
}

static void run_count(int64_t rows, int64_t width, int64_t bins, double scale, int64_t missing) {
    for (int turn = 0; turn < 6; turn++) {
        int wide = turn % 2, moments = turn / 2;
        double *powers = calloc((size_t)(2 * width), sizeof *powers);
        count_options options = {bins, bins ? -1.0 : 0.0, bins ? 1.0 : 0.0, 0.1, 0.9, 1, moments > 0,
                                 moments > 1 ? powers : NULL, moments > 1 ? powers + width : NULL};
        void *values = filled(rows * (width - missing), wide ? 8 : 4, scale);
        unit_stats *units = calloc((size_t)width, sizeof *units);
        int64_t *histogram = calloc((size_t)(width * bins) + 1, sizeof *histogram);
        if (rows && !missing) {
            if (wide) {
                ((double *)values)[0] = NAN;
            } else {
                ((float *)values)[0] = INFINITY;
            }
        }
        for (int again = 0; again < 2; again++) {
            if (wide) {
                grutrace_count_f64(values, rows, width, units, histogram, &options);
            } else {
                grutrace_count_f32(values, rows, width, units, histogram, &options);
            }
        }
        if (rows && units[width - 1].count + units[width - 1].infinite +
                        units[width - 1].nan != 2 * rows) {
            printf("wrong count\n");
            exit(1);
        }
        free(powers), free(values), free(units), free(histogram);
    }
}

static void run_states(int64_t steps, int64_t batch, int64_t units, int64_t reverse) {
    int64_t count = steps * batch * units;
    for (int wide = 0; wide < 2; wide++) {
        size_t size = wide ? 8 : 4;
        void *z = filled(count, size, 1), *n = filled(count, size, 1), *h = filled(count, size, 1);
        void *initial = filled(batch * units, size, 1), *rows = filled(count, size, 0);
        if (wide) {
            grutrace_states_f64(z, n, h, batch * units, units, initial, rows, steps, batch, units,
                                reverse);
        } else {
            grutrace_states_f32(z, n, h, batch * units, units, initial, rows, steps, batch, units,
                                reverse);
        }
        free(z), free(n), free(h), free(initial), free(rows);
    }
}

static void run_replay(int64_t steps, int64_t batch, int64_t units, int64_t grouping) {
    int64_t count = steps * batch * units, groups = grouping == 0 ? 1
                                                     : grouping == 1 ? steps
                                                                     : steps * batch;
    float *input = filled(3 * count, 4, 200), *product = filled(3 * count, 4, 3);
    float *before = filled(count, 4, 1), *after = filled(count, 4, 1);
    float *gates[3] = {filled(count, 4, 0), NULL, filled(count, 4, 0)};
    double *checks = filled(3 * groups, 8, 0);
    replay_block block = {input, product, before, after, {batch * units, units},
                          {batch * units, units}, {gates[0], gates[1], gates[2]},
                          /* Sequence by sequence. */
                          {units, steps * units}, steps, batch, units, grouping, checks};
    grutrace_replay(&block);
    if (count) {
        input[0] = NAN;
        grutrace_replay(&block);
    }
    free(input), free(product), free(before), free(after), free(gates[0]), free(gates[2]);
    free(checks);
}

static void run_copies(int64_t steps, int64_t batch, int64_t size, int64_t unit_step) {
    int64_t units = (size + unit_step - 1) / unit_step;
    char *copies = filled(3 * steps * batch * units, 4, 0);
    int64_t *rows = malloc((size_t)steps * sizeof *rows);
    gate_copy gates[3];
    for (int gate = 0; gate < 3; gate++) {
        gate_copy copy = {gate < 2 ? 3 * size : size, gate < 2 ? (gate - 2) * size : 0, unit_step,
                          units, 4, copies + 4 * gate * steps * batch * units, steps * units, units,
                          NULL};
        gates[gate] = copy;
    }
    for (int64_t t = 0; t < steps; t++) {
        rows[t] = batch;
    }
    copy_plan plan = {gates, gates + 2, 2, 1, rows, steps, 0, NULL};
    char *product = filled(3 * batch * size, 4, 1), *sums[2];
    sums[0] = filled(batch * size, 4, 1);
    sums[1] = filled(batch * size, 4, 1);
    for (int64_t t = 0; t < steps; t++) {
        grutrace_copy_step(&plan, product + 8 * size, sums[t % 2]);
    }
    grutrace_copy_step(&plan, NULL, NULL);
    free(copies), free(rows), free(product), free(sums[0]), free(sums[1]);
}

static void run_calls(int64_t batch, int64_t width, int64_t units, int64_t gates) {
    for (int wide = 0; wide < 2; wide++) {
        int64_t size = wide ? 8 : 4, calls = 3, state_size = batch * units * size;
        char *input = filled(calls * batch * width, (size_t)size, 0);
        char *initial = filled(calls * batch * units, (size_t)size, 0);
        char *final = filled(calls * batch * units, (size_t)size, 0), *targets[3] = {NULL};
        double *residuals = filled(calls, 8, 0);
        for (int64_t gate = gates == 2; gates && gate < 3; gate++) {
            targets[gate] = filled(calls * batch * units, (size_t)size, 0);
        }
        call_series series = {input, initial, final, {targets[0], targets[1], targets[2]},
                              batch * width * size, state_size, batch, units, size, residuals};
        char *x = filled(batch * width, (size_t)size, 1), *h = filled(batch * units, (size_t)size, 1);
        char *zeros = calloc((size_t)state_size + 1, 1);
        char *product = filled(3 * batch * units, (size_t)size, 1);
        char *candidate = filled(batch * units, (size_t)size, 1);
        const char *third = gates ? product + 2 * units * size : NULL;
        int64_t kinds[3] = {
            grutrace_add_call(&series, 0, x, h, h, third, gates ? candidate : NULL),
            grutrace_add_call(&series, 1, x, h, h, third, gates ? candidate : NULL),
            grutrace_add_call(&series, 2, NULL, zeros, NULL, third, gates ? candidate : NULL),
        };
        if (kinds[0] != OWN_STATE || kinds[1] != CHAINED_STATE || kinds[2] != ZERO_STATE) {
            printf("wrong states\n");
            exit(1);
        }
        free(input), free(initial), free(final), free(residuals), free(x), free(h), free(zeros);
        free(product), free(candidate), free(targets[0]), free(targets[1]), free(targets[2]);
    }
}

static void run_held(int64_t batch, int64_t units, int held) {
    float *product = filled(3 * batch * units, 4, 1), *state = filled(batch * units, 4, 1);
    float *input = filled(3 * batch * units, 4, 1), *output = filled(batch * units, 4, 0);
    float *values = filled(units, 4, 1);
    int32_t *masks = malloc((size_t)units * sizeof *masks);
    for (int64_t unit = 0; unit < units; unit++) {
        masks[unit] = unit % 2 ? -1 : 0;
    }
    held_step step = {product, state, {NULL}, {NULL}, batch, units};
    for (int gate = 0; gate < held; gate++) {
        step.masks[gate] = masks;
        step.values[gate] = values;
    }
    grutrace_held_step(&step, input, output);
    if (memcmp(state, output, (size_t)(batch * units) * sizeof *state) != 0 ||
        (held == 4 && units > 1 && state[1] != values[1])) {
        printf("wrong states of a held step\n");
        exit(1);
    }
    free(product), free(state), free(input), free(output), free(values), free(masks);
}

static void run_directions(int64_t steps, int64_t units, int64_t count, int64_t longest) {
    int64_t columns = (count + DIRECTION_GROUP - 1) / DIRECTION_GROUP * DIRECTION_GROUP;
    double *weights = filled(3 * units * units, 8, 1), *factors[4];
    for (int i = 0; i < 4; i++) {
        factors[i] = filled(steps * units, 8, 1);
    }
    double *directions = calloc((size_t)(units * columns), sizeof *directions);
    for (int64_t i = 0; i < count; i++) {
        directions[i * columns + i] = 1;
    }
    double *logs = calloc((size_t)count, sizeof *logs);
    double *memory =
        malloc((size_t)(2 * units * columns + DIRECTION_GROUP * units + 2 * columns) * sizeof *memory);
    direction_steps block = {weights, factors[0], {factors[1], factors[2], factors[3]}, directions, logs,
                             memory, steps, units, columns, count, 3, longest, 6, 9};
    if (!grutrace_directions(&block) || block.interval < 1) {
        printf("wrong directions\n");
        exit(1);
    }
    factors[0][steps * units - 1] = NAN;
    if (grutrace_directions(&block)) {
        printf("a growth that is not finite\n");
        exit(1);
    }
    free(weights), free(directions), free(logs), free(memory);
    free(factors[0]), free(factors[1]), free(factors[2]), free(factors[3]);
}

int main(int count, char **arguments) {
    const char *names[] = {"portable", "avx2", "avx512"};
    int64_t sizes[] = {1, 3, 8, 16, 17, 37, 64};
    (void)arguments;
    if (count > 1) {
        grutrace_select("portable");
        run_count(5, 8, 32, 0.9, 1);
    }
    for (int set = 0; set < 3; set++) {
        if (grutrace_select(names[set]) == NULL) {
            continue;
        }
        for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
            for (int64_t rows = 0; rows < 40; rows += 13) {
                run_count(rows, sizes[i], 0, 0.9, 0);
                run_count(rows, sizes[i], 32, 0.9, 0);
                run_count(rows, sizes[i], 1024, 30, 0);
            }
            for (int64_t steps = 1; steps < 6; steps += 2) {
                run_states(steps, 3, sizes[i], steps % 3 == 0);
                run_copies(steps, 3, sizes[i], 1 + steps % 3);
                run_calls(steps, 2, sizes[i], steps % 3);
                run_held(steps, sizes[i], 0);
                run_held(steps, sizes[i], 4);
                run_directions(steps, sizes[i], 1 + sizes[i] / 3, steps % 3 ? 64 : 0);
                for (int64_t grouping = 0; grouping < 3; grouping++) {
                    run_replay(steps, 3, sizes[i], grouping);
                }
            }
        }
    }
    printf("all functions ran\n");
    return 0;
}
