/* Tandem: masked attention on CPUs and NVIDIA GPUs, one definition of masking on both.
 *
 * This header is the whole C ABI. It is C11 and C++, includes nothing but the fixed-width integers,
 * and is written to last: every struct begins with its own size (set `struct_size = sizeof(the
 * struct)`; the TANDEM_*_INIT macros do), handles are opaque, enumerators are pinned, and 0 means
 * "not set", which is an error wherever a choice is required.
 *
 * The meaning of every field is defined in docs/semantics.md. Symbols used in shapes below:
 *   B batch or number of sequences, Hq query heads, Hk key/value heads (Hq is a multiple of Hk;
 * query head h reads key head h / (Hq / Hk)), Sq query rows, Sk key rows, Dqk, Dv head dimensions,
 * Tq, Tk rows of packed tensors.
 *
 * Rules that hold for every function:
 *   - It never prints, aborts, or throws. It returns a tandem_status; on failure
 * tandem_last_error() of the calling thread holds one sentence that names the argument, what it
 * was, and what it may be, and outputs are untouched (except for TANDEM_STATUS_DEVICE_ERROR, which
 * can come after a launch).
 *   - Pointers passed in are borrowed for the call only, unless the function says otherwise.
 *   - Every function may be called from any thread at any time. Handles are immutable after
 * creation (a tandem_kv_cache is not: see there) and may be shared between threads; destroy them
 * once, when no other thread uses them.
 */
#ifndef TANDEM_TANDEM_H_
#define TANDEM_TANDEM_H_

#include <stddef.h>
#include <stdint.h>

#define TANDEM_VERSION_MAJOR 0
#define TANDEM_VERSION_MINOR 1
#define TANDEM_VERSION_PATCH 0
#define TANDEM_VERSION_STRING "0.1.0"

#if defined(TANDEM_STATIC_DEFINE)
#define TANDEM_API
#else
#define TANDEM_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* ----------------------------------------------------------------------------------------------------
 * enumerations */

typedef int32_t tandem_status;
enum {
  TANDEM_STATUS_OK = 0,
  TANDEM_STATUS_INVALID_ARGUMENT =
      1, /* a value, shape, stride, dtype, device or pointer is not allowed */
  TANDEM_STATUS_UNSUPPORTED =
      2, /* valid, but no kernel asked for can serve it; the message has the reasons */
  TANDEM_STATUS_DEVICE_UNAVAILABLE =
      3, /* the device asked for is not there; the message says why */
  TANDEM_STATUS_OUT_OF_MEMORY =
      4, /* host or device allocation failed; nothing leaks, a smaller call works */
  TANDEM_STATUS_WORKSPACE_TOO_SMALL = 5,
  TANDEM_STATUS_DEVICE_ERROR = 6, /* the device reported an error; the message carries its text */
  TANDEM_STATUS_INTERNAL = 7      /* a defect in Tandem; please report it */
};

typedef int32_t tandem_dtype;
enum {
  TANDEM_DTYPE_UNSET = 0,
  TANDEM_DTYPE_F32 = 1,
  TANDEM_DTYPE_F16 = 2,  /* IEEE binary16 */
  TANDEM_DTYPE_BF16 = 3, /* upper half of an f32 */
  TANDEM_DTYPE_F64 = 4,
  TANDEM_DTYPE_I32 = 5,
  TANDEM_DTYPE_I64 = 6,
  TANDEM_DTYPE_BOOL = 7, /* one byte; 0 is false, anything else true */
  TANDEM_DTYPE_BIT = 8 /* one bit; element e is bit (e & 7) of byte (e >> 3); strides count bits */
};

typedef int32_t tandem_device_type;
enum {
  TANDEM_DEVICE_UNSET = 0, /* in tandem_options: the device that the tensors are on */
  TANDEM_DEVICE_CPU = 1,
  TANDEM_DEVICE_CUDA = 2,
  TANDEM_DEVICE_AUTO =
      3 /* tandem_options only: CUDA when it is there and accepts the problem, else the CPU */
};

typedef int32_t tandem_layout;
enum {
  TANDEM_LAYOUT_UNSET = 0,
  TANDEM_LAYOUT_BHSD =
      1, /* q [B, Hq, Sq, Dqk], k [B, Hk, Sk, Dqk], v [B, Hk, Sk, Dv], out [B, Hq, Sq, Dv] */
  TANDEM_LAYOUT_BSHD =
      2, /* q [B, Sq, Hq, Dqk], k [B, Sk, Hk, Dqk], v [B, Sk, Hk, Dv], out [B, Sq, Hq, Dv] */
  TANDEM_LAYOUT_THD =
      3 /* packed: q [Tq, Hq, Dqk], k [Tk, Hk, Dqk], v [Tk, Hk, Dv]; needs a packed term */
};

/* Where query 0 stands on the key axis: at key 0, or so that the last query meets the last key of
 * its sequence. */
typedef int32_t tandem_alignment;
enum { TANDEM_ALIGN_UNSET = 0, TANDEM_ALIGN_TOP_LEFT = 1, TANDEM_ALIGN_BOTTOM_RIGHT = 2 };

typedef int32_t tandem_mask_kind;
enum {
  TANDEM_MASK_UNSET = 0,
  TANDEM_MASK_BAND = 1,
  TANDEM_MASK_ROW_RANGES = 2,
  TANDEM_MASK_LENGTHS = 3,
  TANDEM_MASK_PACKED = 4,
  TANDEM_MASK_SEGMENTS = 5,
  TANDEM_MASK_DENSE = 6,
  TANDEM_MASK_BLOCK_SPARSE = 7
};

/* ---------------------------------------------------------------------------------------------------------
 * tensors */

#define TANDEM_MAX_RANK 5

/* A borrowed array. `strides` count elements, may be 0 (broadcast) or negative, and need no
 * particular alignment beyond the element's own size. Outputs may not have two indices at one
 * address. */
typedef struct tandem_tensor {
  uint32_t struct_size;
  tandem_dtype dtype;
  tandem_device_type device_type; /* CPU or CUDA: where `data` can be read */
  int32_t device_index;           /* 0 for the CPU */
  int32_t rank;
  int32_t reserved;
  void* data; /* null only where the tensor has no elements */
  int64_t shape[TANDEM_MAX_RANK];
  int64_t strides[TANDEM_MAX_RANK];
} tandem_tensor;
#define TANDEM_TENSOR_INIT                                 \
  {                                                        \
    sizeof(tandem_tensor), 0, 0, 0, 0, 0, NULL, {0}, { 0 } \
  }

/* ------------------------------------------------------------------------------------------------------
 * mask terms */

/* A mask is a list of terms; a pair (i, j) is visible iff every term allows it. Each term begins
 * with this head. */
typedef struct tandem_mask_term {
  uint32_t struct_size; /* of the whole term */
  tandem_mask_kind kind;
} tandem_mask_term;

/* Key j is allowed for query i iff j is in [d - left, d + right], d = i + offset, offset = 0
 * (top-left) or kv_len - q_len of the sequence (bottom-right). -1 is unbounded. Causal: left -1,
 * right 0. */
typedef struct tandem_band_term {
  tandem_mask_term head;
  tandem_alignment alignment; /* required */
  int32_t left;               /* >= -1; used where left_per_head is null */
  int32_t right;              /* >= -1; used where right_per_head is null */
  int32_t reserved;
  const tandem_tensor* left_per_head;  /* null, or i32 [B or 1, Hq or 1] */
  const tandem_tensor* right_per_head; /* null, or i32 [B or 1, Hq or 1] */
  const tandem_tensor*
      prefix; /* null, or i32 [B or 1]: keys j < prefix[b] are exempt from this band */
} tandem_band_term;
#define TANDEM_BAND_TERM_INIT \
  { {sizeof(tandem_band_term), TANDEM_MASK_BAND}, 0, -1, -1, 0, NULL, NULL, NULL }

/* Key j is allowed iff it lies in one of R half-open intervals [begin, end) of its row. */
typedef struct tandem_row_ranges_term {
  tandem_mask_term head;
  const tandem_tensor* ranges; /* i32 [B or 1, Hq or 1, Sq or 1, R, 2] */
} tandem_row_ranges_term;
#define TANDEM_ROW_RANGES_TERM_INIT \
  { {sizeof(tandem_row_ranges_term), TANDEM_MASK_ROW_RANGES}, NULL }

/* Rows i >= q_len[b] are empty, keys j >= kv_len[b] invisible. Lengths are in [0, rows of that
 * sequence]. */
typedef struct tandem_lengths_term {
  tandem_mask_term head;
  const tandem_tensor* q_lengths;  /* null, or i32 [B] */
  const tandem_tensor* kv_lengths; /* null, or i32 [B] */
} tandem_lengths_term;
#define TANDEM_LENGTHS_TERM_INIT \
  { {sizeof(tandem_lengths_term), TANDEM_MASK_LENGTHS}, NULL, NULL }

/* Sequence b owns rows [cu[b], cu[b + 1]); only pairs of one sequence are visible; i and j count
 * from its start. Only with TANDEM_LAYOUT_THD, where it is required. Rows outside every sequence
 * are written as empty rows. */
typedef struct tandem_packed_term {
  tandem_mask_term head;
  const tandem_tensor* cu_seqlens_q; /* i32 or i64 [B + 1], not decreasing, in [0, Tq] */
  const tandem_tensor*
      cu_seqlens_k; /* i32 or i64 [B + 1], not decreasing, in [0, Tk], the same dtype */
  int64_t
      max_q_len; /* the longest sequence; required (> 0) where cu_seqlens are on a GPU, 0 else */
  int64_t max_kv_len;
} tandem_packed_term;
#define TANDEM_PACKED_TERM_INIT \
  { {sizeof(tandem_packed_term), TANDEM_MASK_PACKED}, NULL, NULL, 0, 0 }

/* Visible iff q_segments[b, i] == kv_segments[b, j] and that is >= 0. */
typedef struct tandem_segments_term {
  tandem_mask_term head;
  const tandem_tensor* q_segments;  /* i32 [B or 1, Sq]; packed: i32 [Tq] */
  const tandem_tensor* kv_segments; /* i32 [B or 1, Sk]; packed: i32 [Tk] */
} tandem_segments_term;
#define TANDEM_SEGMENTS_TERM_INIT \
  { {sizeof(tandem_segments_term), TANDEM_MASK_SEGMENTS}, NULL, NULL }

/* Visible iff true. BOOL or BIT, broadcastable to [B, Hq, Sq, Sk] from rank 2 ([Sq, Sk]), 3 ([B,
 * Sq, Sk]) or 4; packed: Sq, Sk are the longest lengths. With `sequence_offsets` the tensor is rank
 * 1 and sequence b's matrix [q_len, kv_len] starts at element offsets[b], row-major, row pitch
 * kv_len of that sequence, for all heads. */
typedef struct tandem_dense_term {
  tandem_mask_term head;
  const tandem_tensor* mask;
  const tandem_tensor* sequence_offsets; /* null, or i64 [B] */
} tandem_dense_term;
#define TANDEM_DENSE_TERM_INIT \
  { {sizeof(tandem_dense_term), TANDEM_MASK_DENSE}, NULL, NULL }

/* Visible iff key block j / kv_block is listed for query block i / q_block. `full_*` lists are more
 * blocks, with the promise that no other term hides a pair of them: a hint about cost, never about
 * meaning. Order and repeats are free.*/
typedef struct tandem_block_sparse_term {
  tandem_mask_term head;
  int32_t q_block;             /* > 0 */
  int32_t kv_block;            /* > 0 */
  const tandem_tensor* counts; /* i32 [B or 1, Hq or 1, ceil(Sq / q_block)] */
  const tandem_tensor*
      indices; /* i32 [B or 1, Hq or 1, ceil(Sq / q_block), N], in [0, ceil(Sk / kv_block)) */
  const tandem_tensor* full_counts;  /* null, or as counts */
  const tandem_tensor* full_indices; /* null, or as indices */
} tandem_block_sparse_term;
#define TANDEM_BLOCK_SPARSE_TERM_INIT \
  { {sizeof(tandem_block_sparse_term), TANDEM_MASK_BLOCK_SPARSE}, 0, 0, NULL, NULL, NULL, NULL }

/* A prepared snapshot of a mask for one device; see tandem_mask_plan_create. */
typedef struct tandem_mask_plan tandem_mask_plan;

/* ---------------------------------------------------------------------------------------------------------
 * problem */

/* The keys and values of growing sequences, in a layout of the library's own; see
 * tandem_kv_cache_create. */
typedef struct tandem_kv_cache tandem_kv_cache;

/* One attention problem. Everything but q, k, v, layout is optional. Tensors and terms are borrowed
 * for each call. */
typedef struct tandem_problem {
  uint32_t struct_size;
  tandem_layout layout; /* required */
  const tandem_tensor* q;
  const tandem_tensor* k; /* the dtype of q */
  const tandem_tensor* v; /* the dtype of q */

  int32_t has_scale; /* 0: 1 / sqrt(Dqk) */
  float scale;       /* finite; zero and negative are values */
  float softcap;     /* > 0: s = softcap * tanh(s / softcap); 0: none */

  int32_t mask_term_count;
  const tandem_mask_term* const* mask_terms; /* [mask_term_count] */
  const tandem_mask_plan* mask_plan;         /* null, or the mask; then mask_term_count is 0 */

  const tandem_tensor*
      bias; /* f32, f16 or bf16, broadcastable as a dense mask; -inf hides the pair */

  const tandem_tensor* alibi_slopes; /* null, or f32 [Hq] or [B, Hq]: s -= slope * |d - j| */
  tandem_alignment alibi_alignment;  /* required with alibi_slopes */

  float dropout_rate; /* in [0, 1); 0: none. Philox4x32-10, see docs/semantics.md */
  uint64_t dropout_seed;
  uint64_t dropout_offset;

  const tandem_tensor* sink; /* null, or f32 [Hq]: one more score per row whose value vector is 0 */

  /* A shard of a larger problem: row i is global row q_offset + i, key j is global key kv_offset +
   * j; mask terms, bias and dropout use global coordinates. Lengths are the global ones; 0: that of
   * the tensors. Not with THD. */
  int64_t q_offset;
  int64_t kv_offset;
  int64_t global_q_len;
  int64_t global_kv_len;

  /* Keys and values in pages: k [pages, page_size, Hk, Dqk] and v [pages, page_size, Hk, Dv] with
   * any strides, block_table i32 [B, N]: key j of sequence b is row j % page_size of page
   * block_table[b][j / page_size]. Sk is N * page_size; entries at or beyond ceil(kv_len /
   * page_size) are not read, so the kv_lengths of a lengths term say how many keys there are.
   * Forward passes; layouts BHSD and BSHD, which are those of q and out. */
  const tandem_tensor* block_table;
  int64_t page_size;

  /* In place of k and v, which are null then. Sk is its capacity, and sequence b has as many keys
   * as were appended (kv_lengths of a lengths term may be smaller). Forward passes on the CPU;
   * layouts BHSD and BSHD; with no mask_plan, block_table or kv_offset. */
  const tandem_kv_cache* kv_cache;

  /* Device memory, i32 [1], or null: set to nonzero bits (TANDEM_DEVICE_STATUS_*) where device data
   * was clamped. */
  int32_t* device_status;
} tandem_problem;
#define TANDEM_PROBLEM_INIT                                                                   \
  {                                                                                           \
    sizeof(tandem_problem), 0, NULL, NULL, NULL, 0, 0.0f, 0.0f, 0, NULL, NULL, NULL, NULL, 0, \
        0.0f, 0, 0, NULL, 0, 0, 0, 0, NULL, 0, NULL, NULL                                     \
  }

enum {
  TANDEM_DEVICE_STATUS_CU_SEQLENS =
      1, /* cu_seqlens decreased, left [0, T], or a sequence exceeded the maximum */
  TANDEM_DEVICE_STATUS_LENGTHS = 2,     /* a length left [0, rows of the sequence] */
  TANDEM_DEVICE_STATUS_BLOCK_INDEX = 4, /* a block count or block index was out of range */
  TANDEM_DEVICE_STATUS_MASK_OFFSET =
      8, /* a sequence offset of a dense mask pointed outside the mask */
  TANDEM_DEVICE_STATUS_BLOCK_TABLE = 16 /* a page of block_table was not one of k and v */
};

typedef struct tandem_outputs {
  uint32_t struct_size;
  int32_t reserved;
  const tandem_tensor*
      out; /* required; the layout's shape; the dtype of q, or f32 (a partial result to merge) */
  const tandem_tensor*
      lse; /* null, or f32 [B, Hq, Sq] (packed: [Hq, Tq]), natural logarithm; -inf for empty rows */
} tandem_outputs;
#define TANDEM_OUTPUTS_INIT \
  { sizeof(tandem_outputs), 0, NULL, NULL }

/* The backward pass: the out and lse of the forward pass (tandem_outputs, both required) and dout
 * in, gradients out (each may be null). Nothing that belongs to an empty row is used, whatever it
 * holds.
 */
typedef struct tandem_gradients {
  uint32_t struct_size;
  int32_t deterministic;     /* nonzero: bit-reproducible even where that costs more */
  const tandem_tensor* dout; /* the shape of out; the dtype of q, or f32 */
  const tandem_tensor* dlse; /* null, or as lse */
  const tandem_tensor* dq;   /* the shape of q; the dtype of q, or f32; so dk and dv */
  const tandem_tensor* dk;
  const tandem_tensor* dv;
  const tandem_tensor* dbias;  /* f32, the bias's own shape */
  const tandem_tensor* dsink;  /* f32 [Hq] */
  const tandem_tensor* dalibi; /* f32, the slopes' own shape */
} tandem_gradients;
#define TANDEM_GRADIENTS_INIT \
  { sizeof(tandem_gradients), 0, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL }

/* A host's own thread pool: calls task(argument, index) once for each index in [0, count), in any
 * order and on any threads, and returns when all are done. Results do not depend on it. */
typedef struct tandem_executor {
  uint32_t struct_size;
  int32_t concurrency; /* >= 1: how many tasks may run at once */
  void* context;
  void (*parallel_for)(void* context, int64_t count, void (*task)(void* argument, int64_t index),
                       void* argument);
} tandem_executor;
#define TANDEM_EXECUTOR_INIT \
  { sizeof(tandem_executor), 0, NULL, NULL }

typedef struct tandem_options {
  uint32_t struct_size;
  tandem_device_type device_type; /* UNSET: where the tensors are */
  int32_t device_index;
  int32_t threads;                 /* CPU: 0 = OpenMP's default */
  const char* kernel;              /* null, or the one kernel to use, by name ("onednn.cpu") */
  const tandem_executor* executor; /* null: OpenMP. Kept by a plan: must outlive it */
} tandem_options;
#define TANDEM_OPTIONS_INIT \
  { sizeof(tandem_options), 0, 0, 0, NULL, NULL }

/* -------------------------------------------------------------------------------------------------
 * status, version */

TANDEM_API const char* tandem_version(void);

/* One sentence for a status code; a static string. */
TANDEM_API const char* tandem_status_string(tandem_status status);

/* The message of the last failure on the calling thread; "" when there was none. Valid until that
 * thread's next call. */
TANDEM_API const char* tandem_last_error(void);

/* -------------------------------------------------------------------------------------------------------
 * attention */

/* The simple way: validates, plans, allocates, runs, and waits. Host tensors may be run on CUDA
 * (options->device_type = TANDEM_DEVICE_CUDA or AUTO): they are copied there and back. CUDA tensors
 * run on the legacy default stream. options may be null. Errors: any status; outputs are written
 * only on success. */
TANDEM_API tandem_status tandem_attention(const tandem_problem* problem,
                                          const tandem_outputs* outputs,
                                          const tandem_options* options);

/* The same for the backward pass: writes the gradients, reads outputs->out and outputs->lse. */
TANDEM_API tandem_status tandem_attention_backward(const tandem_problem* problem,
                                                   const tandem_outputs* outputs,
                                                   const tandem_gradients* gradients,
                                                   const tandem_options* options);

/* A plan: one problem's shapes, strides, dtypes, mask kinds and device, validated, with the kernel
 * that will serve it. Immutable; may be run by many threads at once (each with its own workspace)
 * and reused with other data. */
typedef struct tandem_plan tandem_plan;

/* gradients null: forward. options may be null. Data pointers are not kept. On success *plan is
 * owned by the caller. */
TANDEM_API tandem_status tandem_plan_create(const tandem_problem* problem,
                                            const tandem_outputs* outputs,
                                            const tandem_gradients* gradients,
                                            const tandem_options* options, tandem_plan** plan);
TANDEM_API void tandem_plan_destroy(tandem_plan* plan); /* null is fine */

/* Bytes of scratch memory that tandem_plan_run needs, on the plan's device; 0 is possible. */
TANDEM_API size_t tandem_plan_workspace_size(const tandem_plan* plan);

/* Name of the chosen kernel; valid as long as the plan. */
TANDEM_API const char* tandem_plan_kernel(const tandem_plan* plan);

/* Runs the plan. problem, outputs, gradients: the same structure as planned (else
 * TANDEM_STATUS_INVALID_ARGUMENT), with any data pointers and values (scale, seeds). workspace: at
 * least tandem_plan_workspace_size bytes, aligned to 256, in the plan's device's memory, not shared
 * with a run in flight. stream: a cudaStream_t for CUDA plans (null: the legacy default stream),
 * null for the CPU. On CUDA the call only launches: it does not allocate, wait or synchronise, and
 * it may be captured in a graph. */
TANDEM_API tandem_status tandem_plan_run(const tandem_plan* plan, const tandem_problem* problem,
                                         const tandem_outputs* outputs,
                                         const tandem_gradients* gradients, void* workspace,
                                         size_t workspace_size, void* stream);

/* -------------------------------------------------------------------------------------------------------
 * mask plan */

/* A mask prepared once and used by many problems of the same shape (every layer of a model): packed
 * bits and tile classes of dense terms and copies of all other terms, in memory that the caller
 * allocates. The problem needs q, k, v shapes and the mask terms; data of q, k, v is not read. */
TANDEM_API tandem_status tandem_mask_plan_size(const tandem_problem* problem,
                                               const tandem_options* options, size_t* size);

/* memory: at least tandem_mask_plan_size bytes, aligned to 256, on the plan's device; it must
 * outlive the plan and every run that uses it. On CUDA the preparation is launched on `stream` and
 * runs on that stream may follow at once. The terms' own arrays may be freed once the preparation
 * is done. */
TANDEM_API tandem_status tandem_mask_plan_create(const tandem_problem* problem,
                                                 const tandem_options* options, void* memory,
                                                 size_t size, void* stream,
                                                 tandem_mask_plan** plan);
TANDEM_API void tandem_mask_plan_destroy(tandem_mask_plan* plan); /* null is fine */

typedef int32_t tandem_tile_class;
enum { TANDEM_TILE_EMPTY = 0, TANDEM_TILE_FULL = 1, TANDEM_TILE_PARTIAL = 2 };

/* The truth of a mask whose terms are in host memory. visible: null, or [q_count * kv_count] bytes
 * (0 or 1) for the rows [q_begin, q_begin + q_count) and keys [kv_begin, ...) of one sequence and
 * head. tile: null, or the class of that rectangle as the kernels see it (PARTIAL may be said of a
 * rectangle that is in truth full or empty, never else). */
TANDEM_API tandem_status tandem_mask_inspect(const tandem_problem* problem, int64_t batch,
                                             int64_t head, int64_t q_begin, int64_t q_count,
                                             int64_t kv_begin, int64_t kv_count, uint8_t* visible,
                                             tandem_tile_class* tile);

/* -------------------------------------------------------------------------------------------------
 * key and value cache */

/* Keys and values that grow by appending and are read many times: each head's rows follow each
 * other in memory, whatever layout they come in, so that short queries read them at the speed of
 * memory and nothing is ever packed again. */
typedef struct tandem_kv_cache_config {
  uint32_t struct_size;
  tandem_dtype dtype; /* f32, f16 or bf16: that of q, k and v */
  int64_t batch;      /* sequences: B of the problems that use the cache */
  int64_t kv_heads;   /* Hk */
  int64_t capacity;   /* the most keys that a sequence can hold: Sk */
  int64_t qk_dim;     /* Dqk */
  int64_t v_dim;      /* Dv */
} tandem_kv_cache_config;
#define TANDEM_KV_CACHE_CONFIG_INIT \
  { sizeof(tandem_kv_cache_config), 0, 0, 0, 0, 0, 0 }

/* Bytes of host memory that a cache needs. */
TANDEM_API tandem_status tandem_kv_cache_size(const tandem_kv_cache_config* config, size_t* size);

/* An empty cache in the caller's memory: at least tandem_kv_cache_size bytes, aligned to 256, which
 * must outlive the cache and belong to nobody else. On success *cache is owned by the caller.
 * A cache is the one handle that changes: while a thread appends to it, truncates or destroys it,
 * no other may use it, for a run either. Reading it (runs, lengths) is free for all threads. */
TANDEM_API tandem_status tandem_kv_cache_create(const tandem_kv_cache_config* config, void* memory,
                                                size_t size, tandem_kv_cache** cache);
TANDEM_API void tandem_kv_cache_destroy(tandem_kv_cache* cache); /* null is fine */

/* Appends n rows to every sequence, or the first lengths[b] of them to sequence b. layout: BHSD (k
 * [B, Hk, n, Dqk], v [B, Hk, n, Dv]) or BSHD (k [B, n, Hk, Dqk], v [B, n, Hk, Dv]), in host memory,
 * with any strides. lengths: null, or i32 [B] in [0, n]. Rows beyond them are not read. All rows
 * are appended, or none: a sequence that would exceed the capacity is an error. */
TANDEM_API tandem_status tandem_kv_cache_append(tandem_kv_cache* cache, tandem_layout layout,
                                                const tandem_tensor* k, const tandem_tensor* v,
                                                const tandem_tensor* lengths);

/* Keeps the first lengths[b] keys of sequence b: i32 [B], in [0, what it holds]; null: none. */
TANDEM_API tandem_status tandem_kv_cache_truncate(tandem_kv_cache* cache,
                                                  const tandem_tensor* lengths);

/* Writes how many keys each sequence holds: lengths[B]. */
TANDEM_API tandem_status tandem_kv_cache_lengths(const tandem_kv_cache* cache, int32_t* lengths);

/* -----------------------------------------------------------------------------------------------------------
 * merge */

/* Merges `count` partial results over disjoint keys in the order given, by the rule of
 * docs/semantics.md section 2: empty partials change nothing, not even a bit. partial_out[n] f32
 * and partial_lse[n] f32 have the shapes of tandem_outputs in rank-4 or packed layouts; out: f32,
 * f16 or bf16; lse may be null. All on one device. Only CPU tensors are served yet. */
TANDEM_API tandem_status tandem_merge(tandem_layout layout, int32_t count,
                                      const tandem_tensor* const* partial_out,
                                      const tandem_tensor* const* partial_lse,
                                      const tandem_outputs* outputs, void* stream);

/* ---------------------------------------------------------------------------------------------------------
 * explain */

/* Which kernel would serve a problem, and why each other one would not. */
typedef struct tandem_explanation tandem_explanation;
TANDEM_API tandem_status tandem_explain(const tandem_problem* problem,
                                        const tandem_outputs* outputs,
                                        const tandem_gradients* gradients,
                                        const tandem_options* options,
                                        tandem_explanation** explanation);
TANDEM_API void tandem_explanation_destroy(tandem_explanation* explanation);
TANDEM_API int32_t tandem_explanation_count(const tandem_explanation* explanation);
TANDEM_API int32_t tandem_explanation_chosen(const tandem_explanation* explanation); /* -1: none */
/* Strings live as long as the explanation. reason: null where the kernel accepts. */
TANDEM_API const char* tandem_explanation_kernel(const tandem_explanation* explanation,
                                                 int32_t index);
TANDEM_API tandem_device_type tandem_explanation_device(const tandem_explanation* explanation,
                                                        int32_t index);
TANDEM_API const char* tandem_explanation_reason(const tandem_explanation* explanation,
                                                 int32_t index);

/* -------------------------------------------------------------------------------------------------
 * devices, kernels */

/* Devices of a type that can be used now; never fails (0 with a reason from
 * tandem_device_unavailable_reason). */
TANDEM_API int32_t tandem_device_count(tandem_device_type type);
/* Why there is none; null when there is at least one. A string that lives as long as the process.
 */
TANDEM_API const char* tandem_device_unavailable_reason(tandem_device_type type);
/* One line: name, and the instruction sets or the compute capability in use. Null for a device that
 * is not there. */
TANDEM_API const char* tandem_device_description(tandem_device_type type, int32_t index);

/* Every kernel compiled in or loaded, best first, the CPU's and then CUDA's. */
TANDEM_API int32_t tandem_kernel_count(void);
TANDEM_API const char* tandem_kernel_name(int32_t index);
TANDEM_API tandem_device_type tandem_kernel_device(int32_t index);
/* Why this machine cannot run it; null when it can. */
TANDEM_API const char* tandem_kernel_unavailable_reason(int32_t index);

#ifdef __cplusplus
}
#endif

#endif /* TANDEM_TANDEM_H_ */
