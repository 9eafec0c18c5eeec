/* Passes over bfloat16 activations that torch makes in several: norm, rotation, SwiGLU, softmax and their gradients.

   Compiled for AVX-512 whatever the compiler is told about the machine; `available()` says whether this processor has
   it. Every function takes the addresses of contiguous tensors and works on their memory; the caller holds them. Rows
   are divided over the threads of torch's own OpenMP runtime, whose functions Python hands over (`use_openmp`): a
   second runtime in the process would spin against the first. Each row is computed by one thread in one order, so the
   number of threads does not change a bit. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define FAST __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma")))
#define INLINE FAST static inline __attribute__((always_inline))
typedef uint16_t bf16;

/* --- sixteen numbers at a time --------------------------------------------------------------------------------- */

INLINE __mmask16 tail(long left) { return left >= 16 ? 0xffff : (__mmask16)((1u << left) - 1); }

INLINE __m512 get(const bf16 *from, __mmask16 mask) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from)), 16));
}

INLINE void put(bf16 *to, __mmask16 mask, __m512 value) {
    _mm256_mask_storeu_epi16(to, mask, (__m256i)_mm512_cvtneps_pbh(value));
}

/* e to the x, relative error below 2e-7: 2**n times a polynomial on [-ln 2 / 2, ln 2 / 2] */
INLINE __m512 exponential(__m512 x) {
    x = _mm512_max_ps(_mm512_min_ps(x, _mm512_set1_ps(88.3f)), _mm512_set1_ps(-104.0f));
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.0f / 720);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 120));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 24));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 6));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.5f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, n);
}

INLINE __m512 sigmoid(__m512 x) {
    __m512 one = _mm512_set1_ps(1.0f);
    return _mm512_div_ps(one, _mm512_add_ps(one, exponential(_mm512_sub_ps(_mm512_setzero_ps(), x))));
}

/* --- the arguments of a call, and its rows over threads --------------------------------------------------------- */

typedef struct {
    void *at[6];
    long size[6];
    float number;
    void (*work)(const void *, long, long);
    long rows;
    int threads;
} Call;

static void (*gomp_parallel)(void (*)(void *), void *, unsigned, unsigned);
static int (*gomp_thread)(void);

static void share(void *argument) {
    const Call *call = argument;
    long thread = gomp_thread ? gomp_thread() : 0;
    call->work(call, call->rows * thread / call->threads, call->rows * (thread + 1) / call->threads);
}

static void run(Call *call, long work_per_row) {
    /* below about 30 microseconds starting the threads costs more than they save */
    if (!gomp_parallel || call->rows * work_per_row < 60000) call->threads = 1;
    if (call->threads > call->rows) call->threads = call->rows > 0 ? (int)call->rows : 1;
    if (call->threads > 1) gomp_parallel(share, call, call->threads, 0);
    else call->work(call, 0, call->rows);
}

/* --- root mean square norm --------------------------------------------------------------------------------------- */

/* x, weight, out (rows, d); inverse roots (rows) in float32 */
FAST static void norm_rows(const void *argument, long begin, long end) {
    const Call *c = argument;
    long d = c->size[0];
    const bf16 *weight = c->at[1];
    for (long row = begin; row < end; row++) {
        const bf16 *x = (const bf16 *)c->at[0] + row * d;
        bf16 *out = (bf16 *)c->at[2] + row * d;
        __m512 sum = _mm512_setzero_ps();
        for (long i = 0; i < d; i += 16) {
            __m512 v = get(x + i, tail(d - i));
            sum = _mm512_fmadd_ps(v, v, sum);
        }
        float root = 1.0f / __builtin_sqrtf(_mm512_reduce_add_ps(sum) / d + c->number);
        ((float *)c->at[3])[row] = root;
        for (long i = 0; i < d; i += 16) {
            __mmask16 mask = tail(d - i);
            __m512 v = _mm512_mul_ps(get(x + i, mask), _mm512_set1_ps(root));
            put(out + i, mask, _mm512_mul_ps(v, get(weight + i, mask)));
        }
    }
}

/* gradient, x, weight, roots, addend -> out: addend plus what the norm's input receives; out may be the addend */
FAST static void norm_back_rows(const void *argument, long begin, long end) {
    const Call *c = argument;
    long d = c->size[0];
    const bf16 *weight = c->at[2];
    for (long row = begin; row < end; row++) {
        const bf16 *gradient = (const bf16 *)c->at[0] + row * d, *x = (const bf16 *)c->at[1] + row * d;
        const bf16 *addend = (const bf16 *)c->at[4] + row * d;
        bf16 *out = (bf16 *)c->at[5] + row * d;
        float root = ((const float *)c->at[3])[row];
        __m512 sum = _mm512_setzero_ps();
        for (long i = 0; i < d; i += 16) {
            __mmask16 mask = tail(d - i);
            __m512 g = _mm512_mul_ps(get(gradient + i, mask), get(weight + i, mask));
            sum = _mm512_fmadd_ps(g, get(x + i, mask), sum);
        }
        __m512 share = _mm512_set1_ps(-_mm512_reduce_add_ps(sum) * root * root * root / d), roots = _mm512_set1_ps(root);
        for (long i = 0; i < d; i += 16) {
            __mmask16 mask = tail(d - i);
            __m512 g = _mm512_mul_ps(get(gradient + i, mask), get(weight + i, mask));
            __m512 v = _mm512_fmadd_ps(g, roots, _mm512_mul_ps(get(x + i, mask), share));
            put(out + i, mask, _mm512_add_ps(v, get(addend + i, mask)));
        }
    }
}

/* --- rotation of positions ---------------------------------------------------------------------------------------- */

/* x (rows, heads, width) in rows `stride` apart, in place; cosines, sines (rows, width) in float32; number: 1, or -1
   for the transposed rotation */
FAST static void rotate_rows(const void *argument, long begin, long end) {
    const Call *c = argument;
    long heads = c->size[0], width = c->size[1], stride = c->size[2], half = width / 2;
    __m512 sign = _mm512_set1_ps(c->number);
    for (long row = begin; row < end; row++) {
        const float *cosine = (const float *)c->at[1] + row * width, *sine = (const float *)c->at[2] + row * width;
        for (long head = 0; head < heads; head++) {
            bf16 *low = (bf16 *)c->at[0] + row * stride + head * width, *high = low + half;
            for (long i = 0; i < half; i += 16) {
                __mmask16 mask = tail(half - i);
                __m512 a = get(low + i, mask), b = get(high + i, mask);
                __m512 ca = _mm512_maskz_loadu_ps(mask, cosine + i), cb = _mm512_maskz_loadu_ps(mask, cosine + half + i);
                __m512 sa = _mm512_mul_ps(sign, _mm512_maskz_loadu_ps(mask, sine + i));
                __m512 sb = _mm512_mul_ps(sign, _mm512_maskz_loadu_ps(mask, sine + half + i));
                /* transposed: the two sines change places, which are equal in every rotation */
                put(low + i, mask, _mm512_fnmadd_ps(b, sa, _mm512_mul_ps(a, ca)));
                put(high + i, mask, _mm512_fmadd_ps(a, sb, _mm512_mul_ps(b, cb)));
            }
        }
    }
}

/* --- heads of tokens, gathered for attention -------------------------------------------------------------------------- */

/* x (n, ...) in rows `stride` apart, places (pieces, length) -> out (pieces, heads, length, width); zero where a place is
   negative. A row of work is one piece. */
FAST static void gather_rows(const void *argument, long begin, long end) {
    const Call *c = argument;
    long length = c->size[0], heads = c->size[1], width = c->size[2], stride = c->size[3];
    for (long piece = begin; piece < end; piece++)
        for (long i = 0; i < length; i++) {
            long place = ((const int64_t *)c->at[1])[piece * length + i];
            for (long head = 0; head < heads; head++) {
                bf16 *to = (bf16 *)c->at[2] + ((piece * heads + head) * length + i) * width;
                if (place < 0) memset(to, 0, width * sizeof(bf16));
                else memcpy(to, (const bf16 *)c->at[0] + place * stride + head * width, width * sizeof(bf16));
            }
        }
}

/* the way back: from (pieces, heads, length, width) to the rows of x, past those before `skip[piece]` */
FAST static void scatter_rows(const void *argument, long begin, long end) {
    const Call *c = argument;
    long length = c->size[0], heads = c->size[1], width = c->size[2], stride = c->size[3];
    for (long piece = begin; piece < end; piece++)
        for (long i = ((const int32_t *)c->at[3])[piece]; i < length; i++) {
            long place = ((const int64_t *)c->at[1])[piece * length + i];
            if (place < 0) continue;
            for (long head = 0; head < heads; head++)
                memcpy((bf16 *)c->at[0] + place * stride + head * width,
                       (const bf16 *)c->at[2] + ((piece * heads + head) * length + i) * width, width * sizeof(bf16));
        }
}

/* --- SwiGLU -------------------------------------------------------------------------------------------------------- */

/* gate and up side by side (rows, 2 width) -> out (rows, width) */
FAST static void swiglu_rows(const void *argument, long begin, long end) {
    const Call *c = argument;
    long width = c->size[0];
    for (long row = begin; row < end; row++) {
        const bf16 *gate = (const bf16 *)c->at[0] + row * 2 * width, *up = gate + width;
        bf16 *out = (bf16 *)c->at[1] + row * width;
        for (long i = 0; i < width; i += 16) {
            __mmask16 mask = tail(width - i);
            __m512 g = get(gate + i, mask);
            put(out + i, mask, _mm512_mul_ps(_mm512_mul_ps(g, sigmoid(g)), get(up + i, mask)));
        }
    }
}

/* gradient (rows, width), gate and up -> their gradients side by side */
FAST static void swiglu_back_rows(const void *argument, long begin, long end) {
    const Call *c = argument;
    long width = c->size[0];
    __m512 one = _mm512_set1_ps(1.0f);
    for (long row = begin; row < end; row++) {
        const bf16 *gradient = (const bf16 *)c->at[0] + row * width;
        const bf16 *gate = (const bf16 *)c->at[1] + row * 2 * width, *up = gate + width;
        bf16 *to_gate = (bf16 *)c->at[2] + row * 2 * width, *to_up = to_gate + width;
        for (long i = 0; i < width; i += 16) {
            __mmask16 mask = tail(width - i);
            __m512 g = get(gate + i, mask), u = get(up + i, mask), d = get(gradient + i, mask), s = sigmoid(g);
            __m512 silu = _mm512_mul_ps(g, s);
            __m512 slope = _mm512_fmadd_ps(silu, _mm512_sub_ps(one, s), s);
            put(to_up + i, mask, _mm512_mul_ps(d, silu));
            put(to_gate + i, mask, _mm512_mul_ps(_mm512_mul_ps(d, u), slope));
        }
    }
}

/* --- softmax over the keys that a query sees ------------------------------------------------------------------------ */

/* Scores (pieces, heads, queries, keys): query i of piece p sees its first starts[p] + i + 1 keys, and none where these
   are more than ends[p]: there the query is padding. The weights of what is not seen become zero. In place. */
INLINE long seen_by(const Call *c, long row) {
    long queries = c->size[0], heads = c->size[2], piece = row / (queries * heads), query = row % queries;
    long seen = ((const int32_t *)c->at[1])[piece] + query + 1;
    return seen <= ((const int32_t *)c->at[2])[piece] ? seen : 0;
}

FAST static void softmax_rows(const void *argument, long begin, long end) {
    const Call *c = argument;
    long keys = c->size[1];
    for (long row = begin; row < end; row++) {
        bf16 *x = (bf16 *)c->at[0] + row * keys;
        long seen = seen_by(c, row);
        __m512 most = _mm512_set1_ps(-3.0e38f), sum = _mm512_setzero_ps();
        for (long i = 0; i < seen; i += 16) {
            __mmask16 mask = tail(seen - i);
            most = _mm512_mask_max_ps(most, mask, most, get(x + i, mask));
        }
        __m512 peak = _mm512_set1_ps(_mm512_reduce_max_ps(most));
        for (long i = 0; i < seen; i += 16) {
            __mmask16 mask = tail(seen - i);
            sum = _mm512_mask_add_ps(sum, mask, sum, exponential(_mm512_sub_ps(get(x + i, mask), peak)));
        }
        __m512 part = _mm512_set1_ps(1.0f / _mm512_reduce_add_ps(sum));
        for (long i = 0; i < keys; i += 16) {
            __mmask16 mask = i < seen ? tail(seen - i) : 0;
            __m512 value = _mm512_mul_ps(exponential(_mm512_sub_ps(get(x + i, mask), peak)), part);
            put(x + i, tail(keys - i), _mm512_maskz_mov_ps(mask, value));
        }
    }
}

/* gradient of the weights -> gradient of the scores, in place; weights are zero where nothing is seen */
FAST static void softmax_back_rows(const void *argument, long begin, long end) {
    const Call *c = argument;
    long keys = c->size[1];
    for (long row = begin; row < end; row++) {
        bf16 *gradient = (bf16 *)c->at[0] + row * keys;
        const bf16 *weight = (const bf16 *)c->at[3] + row * keys;
        long seen = seen_by(c, row);
        __m512 sum = _mm512_setzero_ps();
        for (long i = 0; i < seen; i += 16) {
            __mmask16 mask = tail(seen - i);
            sum = _mm512_fmadd_ps(get(gradient + i, mask), get(weight + i, mask), sum);
        }
        __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum));
        for (long i = 0; i < keys; i += 16) {
            __mmask16 mask = i < seen ? tail(seen - i) : 0;
            __m512 value = _mm512_mul_ps(get(weight + i, mask), _mm512_sub_ps(get(gradient + i, mask), mean));
            put(gradient + i, tail(keys - i), value);
        }
    }
}

/* --- cross-entropy and its gradient ---------------------------------------------------------------------------------- */

/* logits (rows, vocabulary) become scale * (softmax - one at the target); losses (rows) in float32 */
FAST static void cross_entropy_rows(const void *argument, long begin, long end) {
    const Call *c = argument;
    long vocabulary = c->size[0];
    for (long row = begin; row < end; row++) {
        bf16 *x = (bf16 *)c->at[0] + row * vocabulary;
        long target = ((const int64_t *)c->at[1])[row];
        __m512 most = _mm512_set1_ps(-3.0e38f), sum = _mm512_setzero_ps();
        for (long i = 0; i < vocabulary; i += 16) {
            __mmask16 mask = tail(vocabulary - i);
            most = _mm512_mask_max_ps(most, mask, most, get(x + i, mask));
        }
        float peak = _mm512_reduce_max_ps(most);
        __m512 peaks = _mm512_set1_ps(peak);
        for (long i = 0; i < vocabulary; i += 16) {
            __mmask16 mask = tail(vocabulary - i);
            sum = _mm512_mask_add_ps(sum, mask, sum, exponential(_mm512_sub_ps(get(x + i, mask), peaks)));
        }
        float total = _mm512_reduce_add_ps(sum);
        uint32_t bits = (uint32_t)x[target] << 16;
        float at_target;
        __builtin_memcpy(&at_target, &bits, 4);
        ((float *)c->at[2])[row] = __builtin_logf(total) + peak - at_target;
        __m512 part = _mm512_set1_ps(c->number / total);
        for (long i = 0; i < vocabulary; i += 16) {
            __mmask16 mask = tail(vocabulary - i);
            put(x + i, mask, _mm512_mul_ps(exponential(_mm512_sub_ps(get(x + i, mask), peaks)), part));
        }
        float share = c->number * (__builtin_expf(at_target - peak) / total - 1.0f);
        put(x + target, 1, _mm512_set1_ps(share));
    }
}

/* --- Python ------------------------------------------------------------------------------------------------------------ */

typedef struct {
    const char *name;
    void (*work)(const void *, long, long);
    int addresses, sizes;
    long weight; /* of an entry of the first size, against a load, a product and a store */
} Kernel;

static const Kernel KERNELS[] = {
    {"norm", norm_rows, 4, 1, 2},
    {"norm_back", norm_back_rows, 6, 1, 4},
    {"rotate", rotate_rows, 3, 3, 64},
    {"swiglu", swiglu_rows, 2, 1, 8},
    {"swiglu_back", swiglu_back_rows, 3, 1, 10},
    {"gather", gather_rows, 3, 4, 64},
    {"scatter", scatter_rows, 4, 4, 64},
    {"softmax", softmax_rows, 3, 3, 8},
    {"softmax_back", softmax_back_rows, 4, 3, 4},
    {"cross_entropy", cross_entropy_rows, 3, 1, 12},
};

/* call(kernel, threads, rows, number, addresses..., sizes...) */
static PyObject *call(PyObject *self, PyObject *const *arguments, Py_ssize_t count) {
    if (count < 4) return PyErr_Format(PyExc_TypeError, "call takes a kernel, threads, rows, a number and its tensors");
    long which = PyLong_AsLong(arguments[0]);
    if (which < 0 || which >= (long)(sizeof KERNELS / sizeof *KERNELS))
        return PyErr_Occurred() ? NULL : PyErr_Format(PyExc_ValueError, "no kernel %ld", which);
    const Kernel *kernel = &KERNELS[which];
    if (count != 4 + kernel->addresses + kernel->sizes)
        return PyErr_Format(PyExc_TypeError, "%s takes %d arguments", kernel->name, 4 + kernel->addresses + kernel->sizes);
    Call made = {.work = kernel->work, .threads = (int)PyLong_AsLong(arguments[1]), .rows = PyLong_AsLong(arguments[2])};
    made.number = (float)PyFloat_AsDouble(arguments[3]);
    for (int i = 0; i < kernel->addresses; i++) made.at[i] = PyLong_AsVoidPtr(arguments[4 + i]);
    for (int i = 0; i < kernel->sizes; i++) made.size[i] = PyLong_AsLong(arguments[4 + kernel->addresses + i]);
    if (PyErr_Occurred()) return NULL;
    long width = kernel->work == rotate_rows ? made.size[0] : kernel->work == softmax_rows || kernel->work == softmax_back_rows ? made.size[1] : made.size[0];
    Py_BEGIN_ALLOW_THREADS
    run(&made, width * kernel->weight);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyObject *use_openmp(PyObject *self, PyObject *const *arguments, Py_ssize_t count) {
    if (count != 2) return PyErr_Format(PyExc_TypeError, "use_openmp takes GOMP_parallel and omp_get_thread_num");
    void *parallel = PyLong_AsVoidPtr(arguments[0]), *thread = PyLong_AsVoidPtr(arguments[1]);
    if (PyErr_Occurred()) return NULL;
    gomp_parallel = (void (*)(void (*)(void *), void *, unsigned, unsigned))parallel;
    gomp_thread = (int (*)(void))thread;
    Py_RETURN_NONE;
}

static PyObject *available(PyObject *self, PyObject *nothing) {
    __builtin_cpu_init();
    return PyBool_FromLong(__builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
                           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"));
}

static PyMethodDef METHODS[] = {
    {"call", (PyCFunction)(void (*)(void))call, METH_FASTCALL, "Run a kernel over the memory of tensors."},
    {"use_openmp", (PyCFunction)(void (*)(void))use_openmp, METH_FASTCALL, "Divide rows over the threads of a runtime."},
    {"available", available, METH_NOARGS, "Whether this processor has what the kernels are compiled for."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef MODULE = {PyModuleDef_HEAD_INIT, "_kernels", NULL, -1, METHODS, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__kernels(void) {
    PyObject *module = PyModule_Create(&MODULE), *names = PyTuple_New(sizeof KERNELS / sizeof *KERNELS);
    if (!module || !names) return NULL;
    for (size_t i = 0; i < sizeof KERNELS / sizeof *KERNELS; i++)
        PyTuple_SET_ITEM(names, i, PyUnicode_FromString(KERNELS[i].name));
    if (PyModule_AddObject(module, "names", names)) return NULL;
    return module;
}
