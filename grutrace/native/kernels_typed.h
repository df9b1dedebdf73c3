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

/* Sums of powers of the deviations of some values from `shift`; the cubes and fourth powers only if they
 * are requested. */
typedef struct {
    double shift, sum, squares, cubes, fourths;
} TYPED(sums);

/* Count one value. Values that are not finite have separate counts. */
static void TYPED(count_value)(REAL value, unit_stats *unit, int64_t *histogram,
                               const count_options *options, TYPED(sums) *sums) {
    if (!isfinite(value)) {
        *(isnan(value) ? &unit->nan : &unit->infinite) += 1;
        return;
    }
    double off = (double)value - sums->shift, square = off * off;
    sums->sum += off;
    sums->squares += square;
    sums->cubes += square * off;
    sums->fourths += square * square;
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

/* Add values to the moments of unit number `number`, whose count already includes them, from their sums
 * about the mean of the earlier values, if any. Chan, Golub and LeVeque (1979), equation 2.1; Pebay
 * (2008), equations 2.1 and 2.2. */
static void TYPED(add_moments)(unit_stats *unit, int64_t number, const count_options *options,
                               const TYPED(sums) *sums) {
    double total = (double)unit->count, off = sums->sum / total;
    unit->mean = sums->shift + off;
    if (options->cubes != NULL) {
        double squares = unit->squares + sums->squares;
        double cubes = options->cubes[number] + sums->cubes;
        double fourths = options->fourths[number] + sums->fourths;
        double square = off * off;
        options->cubes[number] = cubes - 3 * off * squares + 2 * total * (square * off);
        options->fourths[number] =
            fourths - 4 * off * cubes + 6 * square * squares - 3 * total * (square * square);
    }
    unit->squares += sums->squares - sums->sum * off;
}

/* Count the values of `lanes` units from number `first` on, one by one. */
static void TYPED(count_slowly)(const REAL *values, int64_t rows, int64_t stride, int64_t first,
                                int64_t lanes, unit_stats *units, int64_t *histogram,
                                const count_options *options) {
    for (int64_t j = first; j < first + lanes; j++) {
        unit_stats *unit = units + j;
        TYPED(sums) sums = {unit->mean, 0, 0, 0, 0};
        int64_t before = unit->count;
        for (int64_t row = 0; !before && row < rows; row++) {
            if (isfinite(values[row * stride + j])) {
                sums.shift = values[row * stride + j];
                break;
            }
        }
        for (int64_t row = 0; row < rows; row++) {
            TYPED(count_value)(values[row * stride + j], unit, histogram + j * options->bins,
                               options, &sums);
        }
        if (options->moments && unit->count > before) {
            TYPED(add_moments)(unit, j, options, &sums);
        }
    }
}

/* The number of each value's bin, from that of the first edge on. The values are within the edges. */
static inline TYPED(integers) TYPED(bin_of)(TYPED(reals) value, REAL factor, INTEGER last) {
    TYPED(reals) scaled = value * factor;
    TYPED(integers) bin = __builtin_convertvector(scaled, TYPED(integers));
    /* The conversion truncates. */
    bin += scaled < __builtin_convertvector(bin, TYPED(reals));
    return bin + (bin > last); /* The last bin includes its upper edge. */
}

/* Count the bins of `rows` by LANES values, all within the edges, into (LANES, bins) small counts. */
static void TYPED(count_bins)(const REAL *values, int64_t rows, int64_t stride, uint16_t *counts,
                              const count_options *options) {
    double scale = (double)options->bins / (options->high - options->low);
    REAL factor = (REAL)scale;
    INTEGER first = (INTEGER)(options->low * scale), last = (INTEGER)options->bins - 1 + first;
    TYPED(integers) offsets = {0};
    for (int j = 0; j < LANES; j++) {
        offsets[j] = (INTEGER)(j * options->bins) - first;
    }
    /* The numbers of several rows are stored first: a count that waits for a number just stored takes
     * half as long again. */
    enum { ROWS = 64 };
    INTEGER numbers[ROWS * LANES];
    for (int64_t start = 0; start < rows; start += ROWS) {
        int64_t some = rows - start < ROWS ? rows - start : ROWS;
        for (int64_t row = 0; row < some; row++) {
            const REAL *from = values + (start + row) * stride;
            TYPED(integers) bin = TYPED(bin_of)(TYPED(load)(from), factor, last) + offsets;
            memcpy(numbers + row * LANES, &bin, sizeof bin);
        }
        for (int64_t i = 0; i < some * LANES; i += LANES) {
            for (int64_t j = 0; j < LANES; j++) {
                counts[numbers[i + j]] += 1;
            }
        }
    }
}

/* Counts of at most FEW_BINS bins, of LANES units. Bit b of plane k is bit k of the count of bin b, so one
 * addition of bits adds a value of each unit to its bin. Positional population counts: Klarqvist, Mula and
 * Lemire (2021). */
enum { TYPED(PLANES) = 16 };
typedef struct {
    TYPED(integers) planes[TYPED(PLANES)];
    int64_t rows;
} TYPED(few_bins);

/* Counts of bins, of LANES units: `many` are (LANES, bins). */
typedef struct {
    TYPED(few_bins) few;
    uint16_t many[MOST_BINS * LANES];
} TYPED(bin_counts);

/* Add bits to plane k, and what is carried to the next ones. */
static inline void TYPED(add_bits)(TYPED(few_bins) *counts, int k, TYPED(integers) bits) {
    for (; k < TYPED(PLANES); k++) {
        TYPED(integers) carry = counts->planes[k] & bits;
        counts->planes[k] ^= bits;
        bits = carry;
    }
}

/* Count the bins of at most 16 rows. */
static inline __attribute__((always_inline)) void TYPED(add_rows)(
    const REAL *values, int64_t rows, int64_t stride, TYPED(few_bins) *counts,
    const count_options *options) {
    double scale = (double)options->bins / (options->high - options->low);
    REAL factor = (REAL)scale;
    INTEGER first = (INTEGER)(options->low * scale), last = (INTEGER)options->bins - 1 + first;
    TYPED(integers) one = {0}, bits[16];
    one += 1;
    counts->rows += rows;
    if (rows < 16) {
        for (int64_t i = 0; i < rows; i++) {
            TYPED(integers) bin = TYPED(bin_of)(TYPED(load)(values + i * stride), factor, last);
            TYPED(add_bits)(counts, 0, one << ((bin - first) & (FEW_BINS - 1)));
        }
        return;
    }
    for (int i = 0; i < 16; i++) {
        TYPED(integers) bin = TYPED(bin_of)(TYPED(load)(values + i * stride), factor, last);
        bits[i] = one << ((bin - first) & (FEW_BINS - 1));
    }
    /* Pairs of rows to plane 0, of what they carry to plane 1, and so on. */
    for (int k = 0; k < 4; k++) {
        TYPED(integers) plane = counts->planes[k];
        for (int i = 0; i < 8 >> k; i++) {
            TYPED(integers) other = bits[2 * i + 1], either = bits[2 * i] ^ other;
            bits[i] = (bits[2 * i] & other) | (plane & either);
            plane ^= either;
        }
        counts->planes[k] = plane;
    }
    TYPED(add_bits)(counts, 4, bits[0]);
}

/* Write the counts of each unit, (LANES, bins). */
static void TYPED(unpack_bins)(const TYPED(few_bins) *counts, int64_t bins, uint16_t *unpacked) {
    int used = 0;
    while (counts->rows >> used) {
        used++;
    }
    for (int64_t bin = 0; bin < bins; bin++) {
        TYPED(integers) count = {0};
        for (int k = used - 1; k >= 0; k--) {
            count += count + ((counts->planes[k] >> bin) & 1);
        }
        for (int j = 0; j < LANES; j++) {
            unpacked[j * bins + bin] = (uint16_t)count[j];
        }
    }
}

/* What one pass over `rows` by LANES values finds. */
typedef struct {
    TYPED(reals) least, most;
    TYPED(integers) below, above, is_finite;
    double sum[LANES], squares[LANES], cubes[LANES], fourths[LANES];
} TYPED(found);

/* Scan `rows` by LANES values, with the requested sums about `shifts`. For each row, one more line of
 * memory is fetched from `ahead` on. With `few`, count the bins as well; the counts are meaningless if a
 * value is outside the edges or not finite. */
static inline __attribute__((always_inline)) void TYPED(scan)(
    const REAL *values, int64_t rows, int64_t stride, const double *shifts,
    const count_options *options, int moments, int powers, const REAL *ahead, int64_t ahead_stride,
    TYPED(found) *found, TYPED(few_bins) *few) {
    TYPED(reals) least = TYPED(load)(values), most = least;
    TYPED(integers) below = {0}, above = {0}, is_finite = ~below;
    TYPED(doubles) shift[2], sum[2] = {{0}}, squares[2] = {{0}}, cubes[2] = {{0}}, fourths[2] = {{0}};
    REAL lower = (REAL)options->below, upper = (REAL)options->above;
    memcpy(shift, shifts, sizeof shift);
    for (int64_t start = 0; start < rows; start += 16) {
        int64_t stop = start + 16 < rows ? start + 16 : rows;
        for (int64_t row = start; row < stop; row++) {
            const REAL *from = values + row * stride;
            __builtin_prefetch(ahead + row * ahead_stride);
            TYPED(reals) value = TYPED(load)(from), size = TYPED(absolute)(value);
            is_finite &= value - value == 0;
            for (int i = 0; moments && i < 2; i++) {
                TYPED(doubles) off = TYPED(load_doubles)(from + i * (LANES / 2)) - shift[i];
                TYPED(doubles) square = off * off;
                sum[i] += off;
                squares[i] += square;
                if (powers) {
                    cubes[i] += square * off;
                    fourths[i] += square * square;
                }
            }
            least = TYPED(smaller)(least, value);
            most = TYPED(larger)(most, value);
            below -= size < lower;
            above -= size > upper;
        }
        if (few != NULL) {
            TYPED(add_rows)(values + start * stride, stop - start, stride, few, options);
        }
    }
    found->least = least;
    found->most = most;
    found->below = below;
    found->above = above;
    found->is_finite = is_finite;
    memcpy(found->sum, sum, sizeof sum);
    memcpy(found->squares, squares, sizeof squares);
    memcpy(found->cubes, cubes, sizeof cubes);
    memcpy(found->fourths, fourths, sizeof fourths);
}

/* Count `rows` by LANES values of the units from number `first` on. `counts` are their small counts of
 * bins. */
static void TYPED(count_lanes)(const REAL *values, int64_t rows, int64_t stride, int64_t first,
                               unit_stats *units, int64_t *histogram, TYPED(bin_counts) *counts,
                               const count_options *options) {
    TYPED(found) found;
    double shifts[LANES];
    for (int j = 0; j < LANES; j++) {
        const unit_stats *unit = units + first + j;
        shifts[j] = unit->count ? unit->mean : (double)values[first + j];
    }
    /* With bins, the same units are counted in the next rows. Otherwise all units are counted in these
     * rows first: meanwhile the next rows are fetched in order, which is faster. */
    int64_t ahead_stride = options->bins ? stride : LANES;
    const REAL *next = values + rows * stride;
    const REAL *ahead = options->bins ? values + first + 32 * stride : next + first * rows;
    TYPED(few_bins) few = counts->few, *used = NULL;
    if (options->bins && options->bins <= FEW_BINS) {
        used = &few;
    }
    if (!options->moments) {
        TYPED(scan)(values + first, rows, stride, shifts, options, 0, 0, ahead, ahead_stride, &found,
                    used);
    } else if (options->cubes == NULL) {
        TYPED(scan)(values + first, rows, stride, shifts, options, 1, 0, ahead, ahead_stride, &found,
                    used);
    } else {
        TYPED(scan)(values + first, rows, stride, shifts, options, 1, 1, ahead, ahead_stride, &found,
                    used);
    }
    int is_plain = 1;
    for (int j = 0; j < LANES; j++) {
        int is_within = found.least[j] >= options->low && found.most[j] <= options->high;
        /* A sum of finite values can overflow only in float64. */
        is_plain &= found.is_finite[j] && isfinite(found.sum[j]) && (!options->bins || is_within);
    }
    if (!is_plain) {
        TYPED(count_slowly)(values, rows, stride, first, LANES, units, histogram, options);
        return;
    }
    for (int j = 0; j < LANES; j++) {
        unit_stats *unit = units + first + j;
        unit->count += rows;
        unit->minimum = found.least[j] < unit->minimum ? found.least[j] : unit->minimum;
        unit->maximum = found.most[j] > unit->maximum ? found.most[j] : unit->maximum;
        if (options->shares) {
            unit->below += found.below[j];
            unit->above += found.above[j];
        }
        if (options->moments) {
            TYPED(sums) sums = {shifts[j], found.sum[j], found.squares[j], found.cubes[j],
                                found.fourths[j]};
            TYPED(add_moments)(unit, first + j, options, &sums);
        }
    }
    if (used != NULL) {
        counts->few = few;
    } else if (options->bins) {
        TYPED(count_bins)(values + first, rows, stride, counts->many, options);
    }
}

static void TYPED(count)(const REAL *values, int64_t rows, int64_t width, unit_stats *units,
                         int64_t *histogram, const count_options *options) {
    /* Rows that stay in the cache between two passes over them. */
    int64_t block = 192 * 1024 / ((int64_t)sizeof(REAL) * (width > 0 ? width : 1));
    block = block < 16 ? 16 : block - block % 16;
    int64_t whole = width - width % LANES, bins = options->bins;
    /* With bins, LANES units after LANES units, whose small counts stay in the first-level cache. They
     * hold as many rows as 16 bits count. Otherwise block after block. */
    int64_t together = bins ? UINT16_MAX - UINT16_MAX % block : block;
    TYPED(bin_counts) counts;
    for (int64_t start = 0; start < rows; start += together) {
        int64_t stop = rows - start < together ? rows : start + together;
        for (int64_t unit = 0; unit < whole; unit += LANES) {
            memset(&counts.few, 0, sizeof counts.few);
            memset(counts.many, 0, (size_t)(bins * LANES) * sizeof *counts.many);
            for (int64_t at = start; at < stop; at += block) {
                TYPED(count_lanes)(values + at * width, stop - at < block ? stop - at : block, width,
                                   unit, units, histogram, &counts, options);
            }
            if (bins <= FEW_BINS) {
                TYPED(unpack_bins)(&counts.few, bins, counts.many);
            }
            for (int64_t i = 0; i < bins * LANES; i++) {
                histogram[unit * bins + i] += counts.many[i];
            }
        }
        for (int64_t at = start; at < stop; at += block) {
            TYPED(count_slowly)(values + at * width, stop - at < block ? stop - at : block, width,
                                whole, width - whole, units, histogram, options);
        }
    }
}
