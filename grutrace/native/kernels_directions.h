/* Directions along a sequence: products with the Jacobians of its steps, and Gram-Schmidt between. Included
 * by kernels_simd.h, with ISA and LANES defined.
 *
 * The Jacobian is computed a few rows at a time, which takes 3 H^2 products, and multiplies all directions
 * from the cache. Products with the three weights would take three times as many. */

/* Half of a register's floats, as doubles; registers of a group of columns. */
#define WIDTH (LANES / 2)
#define GROUPED (DIRECTION_GROUP / WIDTH)
#define DOUBLES CONCATENATE(doubles_f64, ISA)

static inline DOUBLES WITH_ISA(load_columns)(const double *from) {
    DOUBLES values;
    memcpy(&values, from, sizeof values);
    return values;
}

/* Compute rows of the Jacobian of a step, (WIDTH, units); those after the last unit are zero. */
static void WITH_ISA(jacobian_rows)(const direction_steps *s, int64_t step, int64_t first,
                                    double *restrict rows) {
    int64_t units = s->units, square = units * units;
    for (int64_t row = 0; row < WIDTH; row++) {
        int64_t unit = first + row, at = step * units + unit;
        double *restrict own = rows + row * units;
        if (unit >= units) {
            memset(own, 0, (size_t)units * sizeof *own);
            continue;
        }
        const double *reset = s->weights + unit * units;
        const double *update = reset + square, *candidate = update + square;
        double r = s->gates[0][at], z = s->gates[1][at], n = s->gates[2][at];
        for (int64_t u = 0; u < units; u++) {
            own[u] = r * reset[u] + z * update[u] + n * candidate[u];
        }
        own[unit] += s->keep[at];
    }
}

/* Multiply (units, columns) directions by the Jacobian of a step. `rows` is memory for jacobian_rows. */
static void WITH_ISA(multiply_step)(const direction_steps *s, int64_t step, const double *from,
                                    double *restrict to, double *restrict rows) {
    int64_t units = s->units, columns = s->columns;
    for (int64_t first = 0; first < units; first += WIDTH) {
        WITH_ISA(jacobian_rows)(s, step, first, rows);
        for (int64_t column = 0; column < columns; column += DIRECTION_GROUP) {
            DOUBLES sums[WIDTH][GROUPED];
            memset(sums, 0, sizeof sums);
            for (int64_t u = 0; u < units; u++) {
                DOUBLES own[GROUPED];
                for (int g = 0; g < GROUPED; g++) {
                    own[g] = WITH_ISA(load_columns)(from + u * columns + column + g * WIDTH);
                }
                for (int row = 0; row < WIDTH; row++) {
                    for (int g = 0; g < GROUPED; g++) {
                        sums[row][g] += rows[row * units + u] * own[g];
                    }
                }
            }
            for (int row = 0; row < WIDTH && first + row < units; row++) {
                memcpy(to + (first + row) * columns + column, sums[row], sizeof sums[row]);
            }
        }
    }
}

/* Products of one column with a group of columns, in four sums. */
static void WITH_ISA(column_products)(const double *directions, int64_t units, int64_t columns,
                                      int64_t column, int64_t group, double *products) {
    DOUBLES sums[4][GROUPED];
    memset(sums, 0, sizeof sums);
    for (int64_t first = 0; first < units; first += 4) {
        const double *row = directions + first * columns;
        for (int i = 0; i < 4 && first + i < units; i++, row += columns) {
            for (int g = 0; g < GROUPED; g++) {
                sums[i][g] += row[column] * WITH_ISA(load_columns)(row + group + g * WIDTH);
            }
        }
    }
    for (int g = 0; g < GROUPED; g++) {
        DOUBLES sum = (sums[0][g] + sums[1][g]) + (sums[2][g] + sums[3][g]);
        memcpy(products + group + g * WIDTH, &sum, sizeof sum);
    }
}

/* Make directions orthonormal with modified Gram-Schmidt, and write the logarithms of the diagonal of R.
 * Return whether their squares are normal numbers. `products` is memory for 2 * columns elements. */
static int WITH_ISA(orthonormalize)(const direction_steps *s, double *directions, double *logs,
                                    double *products) {
    int64_t units = s->units, columns = s->columns;
    for (int64_t column = 0; column < s->count; column++) {
        int64_t begin = column - column % DIRECTION_GROUP;
        for (int64_t group = begin; group < columns; group += DIRECTION_GROUP) {
            WITH_ISA(column_products)(directions, units, columns, column, group, products);
        }
        double square = products[column];
        if (!(square > 1e-250 && square < 1e250)) {
            return 0;
        }
        double scale = 1 / sqrt(square), inverse = 1 / square;
        for (int64_t other = begin; other < columns; other++) {
            products[other] = other > column ? products[other] * inverse : 0;
        }
        for (int64_t u = 0; u < units; u++) {
            double *row = directions + u * columns;
            double own = row[column];
            for (int64_t other = begin; other < columns; other += WIDTH) {
                DOUBLES left = WITH_ISA(load_columns)(row + other);
                left -= own * WITH_ISA(load_columns)(products + other);
                memcpy(row + other, &left, sizeof left);
            }
            row[column] = own * scale;
        }
        logs[column] = log(square) / 2;
    }
    return 1;
}

static int WITH_ISA(directions)(direction_steps *s) {
    size_t size = (size_t)(s->units * s->columns) * sizeof(double);
    double *buffers[2] = {s->memory, s->memory + s->units * s->columns};
    double *rows = buffers[1] + s->units * s->columns, *products = rows + DIRECTION_GROUP * s->units;
    double *logs = products + s->columns;
    for (int64_t step = 0; step < s->steps;) {
        int64_t length = s->interval < s->steps - step ? s->interval : s->steps - step;
        const double *from = s->directions;
        for (int64_t i = 0; i < length; i++) {
            WITH_ISA(multiply_step)(s, step + i, from, buffers[i % 2], rows);
            from = buffers[i % 2];
        }
        double *after = buffers[(length - 1) % 2];
        if (!WITH_ISA(orthonormalize)(s, after, logs, products)) {
            return 0;
        }
        if (s->longest > 0) {
            double least = logs[0], most = logs[0];
            for (int64_t i = 1; i < s->count; i++) {
                least = logs[i] < least ? logs[i] : least;
                most = logs[i] > most ? logs[i] : most;
            }
            double grown = most - least, largest = 2.0 * (double)s->interval;
            largest = largest < (double)s->longest ? largest : (double)s->longest;
            double allowed = grown > 0 ? s->spread * (double)length / grown : largest;
            allowed = allowed < largest ? allowed : largest;
            s->interval = allowed > 1 ? (int64_t)allowed : 1;
            if (grown > s->most_spread && length > 1) {
                s->interval = s->interval < length / 2 ? s->interval : length / 2;
                continue;
            }
        }
        memcpy(s->directions, after, size);
        for (int64_t i = 0; i < s->count; i++) {
            s->logs[i] += logs[i];
        }
        step += length;
    }
    return 1;
}

#undef WIDTH
#undef GROUPED
#undef DOUBLES
