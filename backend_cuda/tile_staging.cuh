// Staging of Q, K and V tiles in shared memory: any strides, any alignment, any head dimension,
// zero-padded to the variant's own.
//
// A tile is rows of 16-byte chunks of 8 elements, chunks permuted within a row so that the eight
// rows of a fragment load fall into different banks. f16 and bf16 are kept as they are. An f32
// element x is kept in three bf16 planes x = high + middle + low: each rounds what is left of x to
// nearest, so the three hold all 24 bits, and six of the nine products of two such numbers reach
// f32's own accuracy (the three left out are below 2^-24 of the product).
//
// The split has limits. Below 2^-109 the low plane falls under bf16's smallest subnormal; above
// 2^59 the products can overflow where the sum does not, and infinity - infinity would turn an
// infinite score into NaN. Rows and keys with |x| >= 2^59 are flagged, and their scores computed by
// plain f32 arithmetic (a tiny x loses at most 2^-134 * 2^59 then, far below f32's resolution of a
// score near 1). Values outside the range are taken out of the tile, flagged, and added in plain
// f32. What is flagged depends on that row or key alone, so no other row's bits change with it.
#ifndef TANDEM_BACKEND_CUDA_TILE_STAGING_CUH_
#define TANDEM_BACKEND_CUDA_TILE_STAGING_CUH_

#include "backend_cuda/policy.h"
#include "backend_cuda/tensor_core.cuh"
#include "core/problem.h"

namespace tandem::cuda {

// The rows of one head of one sequence.
struct RowSource {
  const char* base;
  int64_t row_stride;     // in elements
  int64_t column_stride;  // in elements
  int32_t columns;
  bool is_vector;  // contiguous rows that start at multiples of 16 bytes
};

template <DType kDType>
inline constexpr int64_t kElementBytes = kDType == DType::kF32 ? 4 : 2;
// The type of the tensor-core products.
template <DType kDType>
inline constexpr DType kMathType = kDType == DType::kF16 ? DType::kF16 : DType::kBF16;

template <DType kDType>
__device__ __forceinline__ RowSource MakeRowSource(const core::Array4& array, int64_t offset,
                                                   int64_t columns) {
  constexpr int64_t kBytes = kElementBytes<kDType>;
  RowSource source;
  source.base = static_cast<const char*>(array.data) + offset * kBytes;
  source.row_stride = array.row_stride;
  source.column_stride = array.column_stride;
  source.columns = static_cast<int32_t>(columns);
  source.is_vector = (array.column_stride == 1 || columns == 1) &&
                     reinterpret_cast<uintptr_t>(source.base) % 16 == 0 &&
                     array.row_stride * kBytes % 16 == 0;
  return source;
}

// Byte offset of a chunk in a plane of a tile. kPartRows: the rows of a tile that lies in parts of
// 64 columns, as the tensor memory accelerator writes them (stream_kernel.cuh).
template <int kHeadDim, int kPartRows = 0>
__device__ __forceinline__ int ChunkOffset(int row, int chunk) {
  constexpr int kChunks = kHeadDim / 8;
  if constexpr (kPartRows != 0 && kChunks > 8) {
    return chunk / 8 * (kPartRows * 128) + ChunkOffset<64>(row, chunk % 8);
  }
  const int swizzle = kChunks >= 8 ? row & 7 : (row >> 1) & 3;
  return (row * kChunks + (chunk ^ swizzle)) * 16;
}

__device__ __forceinline__ void StoreChunk(char* shared, uint32_t a, uint32_t b, uint32_t c,
                                           uint32_t d) {
  *reinterpret_cast<uint4*>(shared) = make_uint4(a, b, c, d);
}

__device__ __forceinline__ void RaiseFlag(uint64_t* flags, int bit) {
  atomicOr(reinterpret_cast<unsigned long long*>(flags), 1ull << bit);
}

// What a tile is for decides what is flagged.
enum class TileUse { kScores, kValues };

// Scores of f32 rows or keys with such an element are computed in plain f32.
__device__ __forceinline__ bool OverflowsSplit(float x) {
  return (core::FloatToBits(x) & 0x7fffffffu) >= 0x5d000000u;  // 2^59, infinity, NaN
}

// Elements of V that are multiplied apart from the tensor cores: in f16 and bf16 what is not
// finite, in f32 also what does not split exactly.
template <DType kDType>
__device__ __forceinline__ bool IsExceptionalValue(float x) {
  if constexpr (kDType != DType::kF32) return !core::IsFinite(x);
  const uint32_t magnitude = core::FloatToBits(x) & 0x7fffffffu;
  return magnitude >= 0x7f000000u || (magnitude != 0 && magnitude < 0x09000000u);
}

// Two floats as the sum of kParts pairs of f16 or bf16, each the rest of the ones before it rounded
// to nearest.
template <DType kType, int kParts>
__device__ __forceinline__ void SplitPair(float x0, float x1, uint32_t (&part)[kParts]) {
#pragma unroll
  for (int i = 0; i < kParts; ++i) {
    part[i] = PackPair<kType>(x0, x1);
    x0 -= UnpackLow<kType>(part[i]);
    x1 -= UnpackHigh<kType>(part[i]);
  }
}

template <TileUse kUse>
__device__ __forceinline__ void SplitChunk(float (&x)[8], char* shared, int plane_bytes,
                                           uint64_t* flags, int row) {
  bool flagged = false;
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    if constexpr (kUse == TileUse::kScores) {
      flagged = flagged || OverflowsSplit(x[e]);
    } else if (IsExceptionalValue<DType::kF32>(x[e])) {
      flagged = true;
      x[e] = 0.0f;
    }
  }
  if (flagged) RaiseFlag(flags + row / 64, row % 64);
  uint32_t part[4][3];
#pragma unroll
  for (int pair = 0; pair < 4; ++pair)
    SplitPair<DType::kBF16>(x[2 * pair], x[2 * pair + 1], part[pair]);
#pragma unroll
  for (int plane = 0; plane < 3; ++plane) {
    StoreChunk(shared + plane * plane_bytes, part[0][plane], part[1][plane], part[2][plane],
               part[3][plane]);
  }
}

// Stages `count` elements of a row as one chunk of a tile.
template <DType kDType, TileUse kUse>
__device__ __forceinline__ void StageChunk(const char* from, int64_t column_stride, int count,
                                           char* target, int plane_bytes, uint64_t* flags,
                                           int row) {
  if constexpr (kDType == DType::kF32) {
    float x[8];
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      x[e] = e < count ? reinterpret_cast<const float*>(from)[e * column_stride] : 0.0f;
    }
    SplitChunk<kUse>(x, target, plane_bytes, flags, row);
  } else {
    uint32_t x[8];
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      x[e] = e < count ? reinterpret_cast<const uint16_t*>(from)[e * column_stride] : 0u;
    }
    StoreChunk(target, x[0] | x[1] << 16, x[2] | x[3] << 16, x[4] | x[5] << 16, x[6] | x[7] << 16);
  }
}

// StageTile for rows that 16-byte copies cannot serve. A call: it is rare and its callers have no
// registers to spare. Its arguments go by value: a reference would put them into local memory.
template <DType kDType, int kHeadDim, int kRows, int kThreads, TileUse kUse>
static __device__ __noinline__ void StageElements(RowSource source, int64_t first_row, int64_t rows,
                                                  char* shared, uint64_t* flags, int thread) {
  constexpr int kChunks = kHeadDim / 8;
  for (int c = thread; c < kRows * kChunks; c += kThreads) {
    const int row = c / kChunks;
    const int column = c % kChunks * 8;
    const int columns_left = first_row + row < rows ? source.columns - column : 0;
    const char* from =
        source.base + ((first_row + row) * source.row_stride + column * source.column_stride) *
                          kElementBytes<kDType>;
    StageChunk<kDType, kUse>(from, source.column_stride, columns_left,
                             shared + ChunkOffset<kHeadDim>(row, c % kChunks), kRows * kHeadDim * 2,
                             flags, row);
  }
}

// The same for paged keys or values. Pages outside the tensors are reported; others are read in
// their place.
template <DType kDType, int kHeadDim, int kRows, int kThreads, TileUse kUse>
static __device__ __noinline__ void StagePagedElements(const core::Problem& problem,
                                                       const core::Sequence& s, int64_t kv_head,
                                                       int64_t first_row, char* shared,
                                                       uint64_t* flags, int thread) {
  constexpr int kChunks = kHeadDim / 8;
  const core::Array4& array = kUse == TileUse::kScores ? problem.k : problem.v;
  const int64_t columns = kUse == TileUse::kScores ? problem.qk_dim : problem.v_dim;
  const int64_t rows = core::LocalKeys(s);
  int32_t status = 0;
  for (int c = thread; c < kRows * kChunks; c += kThreads) {
    const int row = c / kChunks;
    const int column = c % kChunks * 8;
    const char* from = static_cast<const char*>(array.data);
    int count = 0;
    if (first_row + row < rows) {
      count = static_cast<int>(core::Clamp<int64_t>(columns - column, 0, 8));
      const int64_t page_size = problem.page_table.page_size;
      const int64_t page =
          core::LoadPage(problem.page_table, s.batch, (first_row + row) / page_size, &status);
      from += (page * array.batch_stride + kv_head * array.head_stride +
               (first_row + row) % page_size * array.row_stride + column * array.column_stride) *
              kElementBytes<kDType>;
    }
    StageChunk<kDType, kUse>(from, array.column_stride, count,
                             shared + ChunkOffset<kHeadDim>(row, c % kChunks), kRows * kHeadDim * 2,
                             flags, row);
  }
  if (status != 0 && problem.device_status != nullptr) atomicOr(problem.device_status, status);
}

// Stages rows [first_row, first_row + kRows) of a source by `kThreads` threads, numbered from 0;
// rows at or beyond `rows` are zeros and not read. f16 and bf16 may still be under way when this
// returns: commit and wait for the asynchronous copies. The bits do not depend on how they are
// loaded. flags: one bit per row (f32).
template <DType kDType, int kHeadDim, int kRows, int kThreads, TileUse kUse>
__device__ __forceinline__ void StageTile(const RowSource& source, int64_t first_row, int64_t rows,
                                          char* shared, uint64_t* flags, int thread) {
  constexpr int kChunks = kHeadDim / 8;
  constexpr int64_t kBytes = kElementBytes<kDType>;
  constexpr int kRowStep = kThreads / kChunks;  // a thread stays in its column of chunks
  static_assert(kThreads % kChunks == 0 && kRows % kRowStep == 0, "chunks do not divide evenly");
  // Opaque, so that no address is computed ahead and held in registers through the caller's loop.
  asm volatile("" : "+r"(thread));
  const int column = thread % kChunks * 8;
  // Compared before it is clamped: ptxas up to CUDA 13.3 can fuse a comparison of the clamped
  // number into sm_90's min-and-relu instruction, wrongly.
  const int columns_left = source.columns - column;
  const bool is_whole_chunk = columns_left >= 8;
  const int columns = core::Clamp<int>(columns_left, 0, 8);
  const int rows_here = static_cast<int>(core::Clamp<int64_t>(rows - first_row, 0, kRows));
  const int first = thread / kChunks;
  const char* const start =
      source.base +
      ((first_row + first) * source.row_stride + column * source.column_stride) * kBytes;
  const int64_t step = kRowStep * source.row_stride * kBytes;
  const auto target = [&](int row) { return shared + ChunkOffset<kHeadDim>(row, column / 8); };

  if constexpr (kDType != DType::kF32) {
    if (source.is_vector) {
#pragma unroll 4
      for (int i = 0; i < kRows / kRowStep; ++i) {
        const int row = first + i * kRowStep;
        const bool is_there = row < rows_here && columns_left > 0;
        CopyAsync16(SharedAddress(target(row)), is_there ? start + i * step : source.base,
                    is_there ? columns * 2 : 0);
      }
      return;
    }
  } else if (source.is_vector && is_whole_chunk) {
#pragma unroll 4
    for (int i = 0; i < kRows / kRowStep; ++i) {
      const int row = first + i * kRowStep;
      float4 half[2] = {};
      if (row < rows_here) {
        half[0] = reinterpret_cast<const float4*>(start + i * step)[0];
        half[1] = reinterpret_cast<const float4*>(start + i * step)[1];
      }
      float x[8] = {half[0].x, half[0].y, half[0].z, half[0].w,
                    half[1].x, half[1].y, half[1].z, half[1].w};
      SplitChunk<kUse>(x, target(row), kRows * kHeadDim * 2, flags, row);
    }
    return;
  }
  StageElements<kDType, kHeadDim, kRows, kThreads, kUse>(source, first_row, rows, shared, flags,
                                                         thread);
}

// Stores a chunk of which only the first `size` bytes are there, by elements of `bytes`. A call,
// because it is rare.
static __device__ __noinline__ void StagePartialChunk(uint32_t target, const char* from, int size,
                                                      int bytes) {
  for (int offset = 0; offset < 16; offset += bytes) {
    if (bytes == 2) {
      const uint16_t x =
          offset < size ? *reinterpret_cast<const uint16_t*>(from + offset) : uint16_t{0};
      asm volatile("st.shared.u16 [%0], %1;" ::"r"(target + offset), "h"(x) : "memory");
    } else {
      const uint32_t x = offset < size ? *reinterpret_cast<const uint32_t*>(from + offset) : 0u;
      asm volatile("st.shared.u32 [%0], %1;" ::"r"(target + offset), "r"(x) : "memory");
    }
  }
}

// The part of one thread in copying 16-bit tiles of `kRows` rows: a column of chunks of 16 bytes.
// Rows must be whole chunks at multiples of 16 bytes; chunks beyond `columns` are left alone.
// kIsInParts: the tile lies in parts of 64 columns.
template <int kHeadDim, int kRows, int kThreads, bool kIsInParts = false>
class ChunkColumn {
 public:
  static constexpr int kChunks = kHeadDim / 8;
  static constexpr int kRowStep = kThreads / kChunks;
  static constexpr int kRowBytes = (kIsInParts && kHeadDim > 64 ? 64 : kHeadDim) * 2;
  static_assert(kThreads % kChunks == 0 && kRows % kRowStep == 0, "chunks do not divide evenly");

  static __device__ __forceinline__ int Row(int thread) { return thread / kChunks; }
  static __device__ __forceinline__ int Column(int thread) { return thread % kChunks * 8; }
  // Shared address of the thread's first chunk in the tile at `tile`.
  static __device__ __forceinline__ uint32_t Target(uint32_t tile, int thread) {
    return tile + ChunkOffset < kHeadDim, kIsInParts ? kRows : 0 > (Row(thread), thread % kChunks);
  }
  // Device address of the thread's chunk of a tile that begins with row 0; null where its column is
  // beyond the tensor's.
  static __device__ __forceinline__ const char* Source(const char* base, int64_t row_bytes,
                                                       int64_t columns, int thread) {
    if (Column(thread) >= columns) return nullptr;
    return base + Row(thread) * row_bytes + Column(thread) * 2;
  }

  // Copies a tile whose rows are all there; `pass_bytes` from a row of this thread to the next.
  static __device__ __forceinline__ void CopyWhole(uint32_t target, const char* source,
                                                   int64_t pass_bytes) {
#pragma unroll
    for (int i = 0; i < kRows / kRowStep; ++i) {
      CopyAsync16(RowTarget(target, i), source);
      source += pass_bytes;
    }
  }
  // Copies the first `rows` rows of a tile; the others become zeros. A call, because it is rare.
  static __device__ __noinline__ void CopyCut(uint32_t target, const char* source,
                                              int64_t pass_bytes, int64_t rows, int thread) {
    const int left = static_cast<int>(core::Min<int64_t>(rows, kRows)) - Row(thread);
#pragma unroll
    for (int i = 0; i < kRows / kRowStep; ++i) {
      const bool is_there = i * kRowStep < left;
      CopyAsync16(RowTarget(target, i), is_there ? source + i * pass_bytes : source,
                  is_there ? 16 : 0);
    }
  }

  // Zeros for the chunks of a tile that no copy reaches.
  static __device__ __forceinline__ void ClearBeyond(char* tile, int64_t columns, int thread) {
    if (Column(thread) < columns) return;
    for (int row = Row(thread); row < kRows; row += kRowStep) {
      StoreChunk(tile + ChunkOffset<kHeadDim>(row, thread % kChunks), 0, 0, 0, 0);
    }
  }

 private:
  // The permutation of chunks changes with the low bits of the row.
  static __device__ __forceinline__ uint32_t RowTarget(uint32_t target, int i) {
    const uint32_t permuted = kChunks >= 8 ? (i * kRowStep & 7) * 16 : 0;
    return (target ^ permuted) + i * kRowStep * kRowBytes;
  }
};

// Nonzero in the top bit of each half that is not finite.
template <DType kDType>
__device__ __forceinline__ uint32_t NonFiniteHalves(uint32_t pair) {
  constexpr uint32_t kExponent = kDType == DType::kF16 ? 0x7c007c00u : 0x7f807f80u;
  constexpr uint32_t kLowest = kDType == DType::kF16 ? 0x04000400u : 0x00800080u;
  return ((pair & kExponent) + kLowest) & 0x80008000u;
}

// A pair with 0 in the place of halves that are not finite; `met` is not 0 once there was one.
template <DType kDType>
__device__ __forceinline__ uint32_t WithoutNonFinite(uint32_t pair, uint32_t& met) {
  const uint32_t bad = NonFiniteHalves<kDType>(pair);
  met |= bad;
  return pair & ~((bad >> 15) * 0xffffu);  // 0x8000 becomes 0xffff
}

// The bits of 1.
template <DType kDType>
inline constexpr uint32_t kOneOf = kDType == DType::kF16 ? 0x3c00u : 0x3f80u;

// Replaces every chunk of a tile by what `change(four words)` makes of it.
template <int kHeadDim, int kRows, int kThreads, typename Change>
__device__ __forceinline__ void ForEachChunk(char* shared, int thread, Change change) {
  constexpr int kChunks = kHeadDim / 8;
  for (int c = thread; c < kRows * kChunks; c += kThreads) {
    uint4* chunk =
        reinterpret_cast<uint4*>(shared + ChunkOffset<kHeadDim>(c / kChunks, c % kChunks));
    const uint4 x = *chunk;
    *chunk = make_uint4(change(x.x), change(x.y), change(x.z), change(x.w));
  }
}

// Takes the non-finite elements out of a f16 or bf16 V tile; says whether this thread met one.
template <DType kDType, int kHeadDim, int kRows, int kThreads>
__device__ __forceinline__ bool TakeOutNonFinite(char* shared, int thread) {
  uint32_t met = 0;
  ForEachChunk<kHeadDim, kRows, kThreads>(
      shared, thread, [&](uint32_t pair) { return WithoutNonFinite<kDType>(pair, met); });
  return met != 0;
}

// Leaves ones in the place of the non-finite elements of a tile, and zeros elsewhere.
template <DType kDType, int kHeadDim, int kRows, int kThreads>
__device__ __forceinline__ void KeepNonFiniteAsOnes(char* shared, int thread) {
  ForEachChunk<kHeadDim, kRows, kThreads>(shared, thread, [](uint32_t pair) {
    return (NonFiniteHalves<kDType>(pair) >> 15) * kOneOf<kDType>;
  });
}

// Changes the sign of every element of a f16 or bf16 Q tile; each thread those that it staged.
template <int kHeadDim, int kRows, int kThreads>
__device__ __forceinline__ void FlipSigns(char* shared, int thread) {
  ForEachChunk<kHeadDim, kRows, kThreads>(shared, thread,
                                          [](uint32_t pair) { return pair ^ 0x80008000u; });
}

}  // namespace tandem::cuda

#endif  // TANDEM_BACKEND_CUDA_TILE_STAGING_CUH_
