/* The functions of one instruction set and one floating-point type. Included by kernels_simd.h, with
 * REAL, INTEGER (of the same size), MAGNITUDE (all its bits but the sign), TYPED, ISA and LANES defined.
 * MAXIMUM and MINIMUM, if defined, are instructions that return the second operand for NaN. */

/* Vectors of LANES values and of their comparison masks, and of half as many values, also as doubles. */
typedef REAL TYPED(reals) __attribute__((vector_size(LANES * sizeof(REAL))));
typedef INTEGER TYPED(integers) __attribute__((vector_size(LANES * sizeof(INTEGER))));
typedef REAL TYPED(half) __attribute__((vector_size(LANES / 2 * sizeof(REAL))));
typedef double TYPED(doubles) __attribute__((vector_size(LANES / 2 * sizeof(double))));
typedef int64_t TYPED(longs) __attribute__((vector_size(LANES / 2 * sizeof(int64_t))));

static inline TYPED(reals) TYPED(load)(const REAL *from) {
    TYPED(reals) values;
    memcpy(&values, from, sizeof values);
    return values;
}

static inline TYPED(doubles) TYPED(load_doubles)(const REAL *from) {
    TYPED(half) values;
    memcpy(&values, from, sizeof values);
    return __builtin_convertvector(values, TYPED(doubles));
}

static inline TYPED(reals) TYPED(select)(TYPED(integers) mask, TYPED(reals) a, TYPED(reals) b) {
    return (TYPED(reals))(((TYPED(integers))a & mask) | ((TYPED(integers))b & ~mask));
}

static inline TYPED(reals) TYPED(absolute)(TYPED(reals) values) {
    return (TYPED(reals))((TYPED(integers))values & MAGNITUDE);
}

/* The larger of each two values; `a` if one is NaN. */
static inline TYPED(reals) TYPED(larger)(TYPED(reals) a, TYPED(reals) b) {
#if defined(MAXIMUM)
    return (TYPED(reals))MAXIMUM(b, a);
#else
    return TYPED(select)(b > a, b, a);
#endif
}

/* The smaller of each two values; `a` if one is NaN. */
static inline TYPED(reals) TYPED(smaller)(TYPED(reals) a, TYPED(reals) b) {
#if defined(MINIMUM)
    return (TYPED(reals))MINIMUM(b, a);
#else
    return TYPED(select)(b < a, b, a);
#endif
}

/* ---- states ---------------------------------------------------------------------------------- */

static double TYPED(states)(const REAL *update, const REAL *candidate, const REAL *hidden,
                            int64_t step_stride, int64_t batch_stride, const REAL *initial,
                            REAL *rows, int64_t steps, int64_t batch, int64_t units,
                            int64_t reverse) {
    TYPED(reals) largest = {0};
    TYPED(reals) sum = {0};
    REAL largest_rest = 0, sum_rest = 0;
    int64_t whole = units - units % LANES;
    for (int64_t b = 0; b < batch; b++) {
        for (int64_t t = 0; t < steps; t++) {
            int64_t row = (b * steps + t) * units;
            const REAL *z = update + row, *n = candidate + row;
            const REAL *h = hidden + t * step_stride + b * batch_stride;
            int is_first = reverse ? t == steps - 1 : t == 0;
            const REAL *before =
                is_first ? initial + b * units : h + (reverse ? step_stride : -step_stride);
            int64_t u = 0;
            for (; u < whole; u += LANES) {
                TYPED(reals) vn = TYPED(load)(n + u), vh = TYPED(load)(h + u);
                TYPED(reals) state = (TYPED(load)(before + u) - vn) * TYPED(load)(z + u) + vn;
                TYPED(reals) off = TYPED(absolute)(state - vh);
                largest = TYPED(larger)(largest, off);
                sum += off;
            }
            for (; u < units; u++) {
                REAL state = (before[u] - n[u]) * z[u] + n[u];
                REAL off = state - h[u];
                off = off < 0 ? -off : off;
                largest_rest = off > largest_rest ? off : largest_rest;
                sum_rest += off;
            }
            if (rows != NULL) {
                memcpy(rows + row, h, (size_t)units * sizeof(REAL));
            }
        }
    }
    double total = sum_rest, result = largest_rest;
    for (int i = 0; i < LANES; i++) {
        total += sum[i];
        result = largest[i] > result ? largest[i] : result;
    }
    return isfinite(total) ? result : (double)NAN;
}

/* ---- counting -------------------------------------------------------------------------------- */

/* Count one value. Values that are not finite have separate counts. */
static void TYPED(count_value)(REAL value, double shift, unit_stats *unit, int64_t *histogram,
                               const count_options *options, double *sum, double *squares) {
    if (!isfinite(value)) {
        *(isnan(value) ? &unit->nan : &unit->infinite) += 1;
        return;
    }
    double off = (double)value - shift;
    *sum += off;
    *squares += off * off;
    unit->count += 1;
    unit->minimum = value < unit->minimum ? value : unit->minimum;
    unit->maximum = value > unit->maximum ? value : unit->maximum;
    if (options->shares) {
        REAL size = value < 0 ? -value : value;
        unit->below += size < (REAL)options->below;
        unit->above += size > (REAL)options->above;
    }
    if (options->bins) {
        if (value < options->low) {
            unit->underflow += 1;
        } else if (value > options->high) {
            unit->overflow += 1;
        } else {
            double scale = (double)options->bins / (options->high - options->low);
            int64_t bin = (int64_t)floor(value * scale) - (int64_t)(options->low * scale);
            histogram[bin < options->bins ? bin : options->bins - 1] += 1;
        }
    }
}

/* Add values to the moments of a unit whose count already includes them, from their sums about `shift`,
 * the mean of the earlier values, if any. Chan, Golub and LeVeque (1979), equation 2.1. */
static void TYPED(add_moments)(unit_stats *unit, double shift, double sum, double squares) {
    double total = (double)unit->count;
    unit->mean = shift + sum / total;
    unit->squares += squares - sum * (sum / total);
}

/* Count `rows` by `lanes` values one by one. Rows are `stride` elements apart. */
static void TYPED(count_slowly)(const REAL *values, int64_t rows, int64_t stride, int64_t lanes,
                                unit_stats *units, int64_t *histogram,
                                const count_options *options) {
    for (int64_t j = 0; j < lanes; j++) {
        unit_stats *unit = units + j;
        double sum = 0, squares = 0, shift = unit->mean;
        int64_t before = unit->count;
        for (int64_t row = 0; !unit->count && !before && row < rows; row++) {
            if (isfinite(values[row * stride + j])) {
                shift = values[row * stride + j];
                break;
            }
        }
        for (int64_t row = 0; row < rows; row++) {
            TYPED(count_value)(values[row * stride + j], shift, unit,
                               histogram + j * options->bins, options, &sum, &squares);
        }
        if (options->moments && unit->count > before) {
            TYPED(add_moments)(unit, shift, sum, squares);
        }
    }
}

/* Count the bins of `rows` by LANES values, all within the edges. */
static void TYPED(count_bins)(const REAL *values, int64_t rows, int64_t stride, int64_t *histogram,
                              const count_options *options) {
    double scale = (double)options->bins / (options->high - options->low);
    REAL factor = (REAL)scale;
    INTEGER first = (INTEGER)(options->low * scale), last = (INTEGER)options->bins - 1 + first;
    TYPED(integers) offsets = {0};
    for (int j = 0; j < LANES; j++) {
        offsets[j] = (INTEGER)(j * options->bins) - first;
    }
    for (int64_t row = 0; row < rows; row++) {
        TYPED(reals) scaled = TYPED(load)(values + row * stride) * factor;
        TYPED(integers) bin = __builtin_convertvector(scaled, TYPED(integers));
        /* The conversion truncates. */
        bin += scaled < __builtin_convertvector(bin, TYPED(reals));
        bin += bin > last; /* The last bin includes its upper edge. */
        bin += offsets;
        INTEGER numbers[LANES];
        memcpy(numbers, &bin, sizeof bin);
        for (int j = 0; j < LANES; j++) {
            histogram[numbers[j]] += 1;
        }
    }
}

/* Count `rows` by LANES values. */
static void TYPED(count_lanes)(const REAL *values, int64_t rows, int64_t stride, unit_stats *units,
                               int64_t *histogram, const count_options *options) {
    TYPED(reals) least = TYPED(load)(values), most = least;
    double shifts[LANES], sum[LANES], squares[LANES];
    TYPED(doubles) shift[2], sums[2] = {{0}}, more[2] = {{0}};
    TYPED(integers) below = {0}, above = {0};
    REAL lower = (REAL)options->below, upper = (REAL)options->above;
    for (int j = 0; j < LANES; j++) {
        shifts[j] = units[j].count ? units[j].mean : (double)values[j];
    }
    memcpy(shift, shifts, sizeof shift);
    for (int64_t row = 0; row < rows; row++) {
        __builtin_prefetch(values + (row + 8) * stride);
        TYPED(reals) value = TYPED(load)(values + row * stride);
        TYPED(reals) size = TYPED(absolute)(value);
        for (int i = 0; i < 2; i++) {
            TYPED(doubles) off =
                TYPED(load_doubles)(values + row * stride + i * (LANES / 2)) - shift[i];
            sums[i] += off;
            more[i] += off * off;
        }
        least = TYPED(smaller)(least, value);
        most = TYPED(larger)(most, value);
        below -= size < lower;
        above -= size > upper;
    }
    memcpy(sum, sums, sizeof sum);
    memcpy(squares, more, sizeof squares);
    int is_finite = 1, is_within = 1;
    for (int j = 0; j < LANES; j++) {
        /* A NaN or an infinity is in the sum. A sum of finite values can overflow only in float64. */
        is_finite &= isfinite(sum[j]) != 0;
        is_within &= least[j] >= options->low && most[j] <= options->high;
    }
    if (!is_finite || (options->bins && !is_within)) {
        TYPED(count_slowly)(values, rows, stride, LANES, units, histogram, options);
        return;
    }
    for (int j = 0; j < LANES; j++) {
        unit_stats *unit = units + j;
        unit->count += rows;
        unit->minimum = least[j] < unit->minimum ? least[j] : unit->minimum;
        unit->maximum = most[j] > unit->maximum ? most[j] : unit->maximum;
        if (options->shares) {
            unit->below += below[j];
            unit->above += above[j];
        }
        if (options->moments) {
            TYPED(add_moments)(unit, shifts[j], sum[j], squares[j]);
        }
    }
    if (options->bins) {
        TYPED(count_bins)(values, rows, stride, histogram, options);
    }
}

static void TYPED(count)(const REAL *values, int64_t rows, int64_t width, unit_stats *units,
                         int64_t *histogram, const count_options *options) {
    /* A block of rows stays in the second-level cache while its columns are counted. */
    int64_t block = 192 * 1024 / ((int64_t)sizeof(REAL) * (width > 0 ? width : 1));
    block = block < 16 ? 16 : block;
    int64_t whole = width - width % LANES;
    for (int64_t start = 0; start < rows; start += block) {
        int64_t count = rows - start < block ? rows - start : block;
        const REAL *first = values + start * width;
        for (int64_t unit = 0; unit < whole; unit += LANES) {
            TYPED(count_lanes)(first + unit, count, width, units + unit,
                               histogram + unit * options->bins, options);
        }
        TYPED(count_slowly)(first + whole, count, width, width - whole, units + whole,
                            histogram + whole * options->bins, options);
    }
}

/* Add the second, third and fourth powers of the finite values about the mean of their unit to `sums`,
 * (3, width). */
static void TYPED(add_powers)(const REAL *values, int64_t rows, int64_t width, const double *means,
                              double *sums) {
    enum { HALF = LANES / 2 };
    int64_t block = 192 * 1024 / ((int64_t)sizeof(REAL) * (width > 0 ? width : 1));
    block = block < 16 ? 16 : block;
    int64_t whole = width - width % HALF;
    for (int64_t start = 0; start < rows; start += block) {
        int64_t stop = rows - start < block ? rows : start + block;
        for (int64_t unit = 0; unit < whole; unit += HALF) {
            TYPED(doubles) mean, powers[3];
            memcpy(&mean, means + unit, sizeof mean);
            for (int power = 0; power < 3; power++) {
                memcpy(powers + power, sums + power * width + unit, sizeof mean);
            }
            for (int64_t row = start; row < stop; row++) {
                TYPED(doubles) value = TYPED(load_doubles)(values + row * width + unit);
                TYPED(longs) is_finite = value - value == 0;
                TYPED(doubles) off = (TYPED(doubles))((TYPED(longs))(value - mean) & is_finite);
                TYPED(doubles) square = off * off;
                powers[0] += square;
                powers[1] += square * off;
                powers[2] += square * square;
            }
            for (int power = 0; power < 3; power++) {
                memcpy(sums + power * width + unit, powers + power, sizeof mean);
            }
        }
        for (int64_t unit = whole; unit < width; unit++) {
            for (int64_t row = start; row < stop; row++) {
                double off = (double)values[row * width + unit] - means[unit];
                double square = off * off;
                if (isfinite(values[row * width + unit])) {
                    sums[unit] += square;
                    sums[width + unit] += square * off;
                    sums[2 * width + unit] += square * square;
                }
            }
        }
    }
}
