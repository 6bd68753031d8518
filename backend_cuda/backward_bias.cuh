// dBias where the bias has rows and keys of its own: a block computes one tile of it, and where the
// bias is broadcast over sequences or heads, adds them up in their order. Nothing of the size of
// all pairs is ever in memory but the gradient itself.
#ifndef TANDEM_BACKEND_CUDA_BACKWARD_BIAS_CUH_
#define TANDEM_BACKEND_CUDA_BACKWARD_BIAS_CUH_

#include "backend_cuda/backward_kernel.cuh"

namespace tandem::cuda {

template <DType kDType, int kHeadDim>
inline constexpr BiasPolicy kBiasPolicy = MakeBiasPolicy(kDType, kHeadDim);

template <DType kDType, int kHeadDim>
__global__ void __launch_bounds__(kBiasPolicy<kDType, kHeadDim>.threads)
    BiasMatrixKernel(const __grid_constant__ BackwardParams params, int64_t row_tiles,
                     int64_t key_tiles) {
  constexpr BiasPolicy kPolicy = kBiasPolicy<kDType, kHeadDim>;
  constexpr int kStepTiles = kPolicy.rows / 8;
  constexpr int kPlaneBytes = kPolicy.tile_bytes / kPlanesOf<kDType>;
  using Warp = WarpAttention<kDType, kHeadDim, 1, kStepTiles>;
  extern __shared__ __align__(1024) char shared[];
  __shared__ Sequence sequence;
  __shared__ uint64_t words[kPolicy.rows];
  __shared__ uint32_t kept_words[kPolicy.rows][2];
  const Problem& p = params.problem;
  const Array4& dbias = p.dbias;
  const int64_t first_key = blockIdx.x % key_tiles * kPolicy.rows;
  const int64_t first_query = blockIdx.x / key_tiles % row_tiles * kPolicy.rows;
  const int64_t plane = blockIdx.x / key_tiles / row_tiles;
  const bool is_per_batch = dbias.batch_stride != 0;
  const bool is_per_head = dbias.head_stride != 0;
  const int64_t heads = is_per_head ? p.q_heads : 1;
  const int64_t batch_begin = is_per_batch ? plane / heads : 0;
  const int64_t batch_end = is_per_batch ? batch_begin + 1 : p.batch;
  const int64_t head_begin = is_per_head ? plane % heads : 0;
  const int64_t head_end = is_per_head ? head_begin + 1 : p.q_heads;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const uint32_t tiles = SharedAddress(shared);

  float sum[kStepTiles][4] = {};
  for (int64_t batch = batch_begin; batch < batch_end; ++batch) {
    int32_t status = 0;
    const Sequence s = core::ResolveSequence(p, batch, &status);
    __syncthreads();
    if (threadIdx.x == 0) sequence = s;
    if (first_query >= s.q_rows || first_key >= s.kv_rows) continue;
    for (int64_t head = head_begin; head < head_end; ++head) {
      const core::TileClass tile_class = core::ClassifyTile(
          p.mask, s, head, first_query, core::Min<int64_t>(first_query + kPolicy.rows, s.q_rows),
          first_key, first_key + kPolicy.rows);
      if (tile_class == core::TileClass::kEmpty) continue;
      __syncthreads();  // before the tiles of the last head are overwritten
      const int64_t query_row = QueryPlaneRow(params, s, head) + first_query;
      const int64_t key_row = KeyPlaneRow(params, s, head / p.group) + first_key;
      const uint16_t* planes[] = {params.queries.first, params.queries.second, params.keys.first,
                                  params.keys.second};
#pragma unroll
      for (int t = 0; t < 4; ++t) {
        StartPlanes<kDType, kHeadDim, kPolicy.rows, kPolicy.threads>(
            tiles + t * kPolicy.tile_bytes, planes[t], t < 2 ? query_row : key_row);
      }
      CommitCopies();
      for (int row = threadIdx.x; row < kPolicy.rows; row += kPolicy.threads) {
        words[row] = VisibleKeys(p, s, head, first_query + row, first_key);
      }
      for (int n = threadIdx.x; p.dropout.enabled != 0 && n < 2 * kPolicy.rows;
           n += kPolicy.threads) {
        kept_words[n / 2][n % 2] =
            KeptKeys(p.dropout, s.batch * p.q_heads + head, s.q_offset + first_query + n / 2,
                     s.kv_offset + first_key + n % 2 * 32);
      }
      WaitCopies<0>();
      __syncthreads();

      const uint32_t queries = tiles + Warp::RowMajorOffset(lane) + warp * 16 * Warp::kRowBytes;
      const uint32_t keys = tiles + 2 * kPolicy.tile_bytes + Warp::KeyOffset(lane);
      typename Warp::QueryFragments unused;
      typename Warp::Scores products;
      typename Warp::Scores dp;
      Warp::template MultiplyQueryKey<false>(queries, kPlaneBytes, unused, keys, kPlaneBytes,
                                             products);
      Warp::template MultiplyQueryKey<false>(queries + kPolicy.tile_bytes, kPlaneBytes, unused,
                                             keys + kPolicy.tile_bytes, kPlaneBytes, dp);
      const int64_t warp_query = first_query + 16 * warp;
      const int64_t query_word = QueryFlagWord(params, s, head, first_query);
      const int64_t key_word = KeyFlagWord(params, s, head / p.group, first_key);
      if ((params.queries.first_flags[query_word] | params.queries.second_flags[query_word] |
           params.keys.first_flags[key_word] | params.keys.second_flags[key_word]) != 0) {
        const PairTile tile = {&params,   &sequence, head,       warp_query,
                               first_key, 1,         kStepTiles, false};
        InMemory(products, dp, [&](float* scores, float* gradients) {
          PatchPairs<kDType>(tile, scores, gradients);
        });
      }
      const int row = 16 * warp + (lane >> 2);
      uint32_t visible[1] = {0};
      uint32_t kept[1] = {0};
#pragma unroll
      for (int n = 0; n < kStepTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int key = 8 * n + 2 * (lane & 3) + e % 2;
          const int bit = 16 * (e / 2) + 2 * n + e % 2;
          const int n_row = row + 8 * (e / 2);
          visible[0] |= static_cast<uint32_t>((words[n_row] >> key) & 1u) << bit;
          kept[0] |= (kept_words[n_row][key / 32] >> (key % 32) & 1u) << bit;
        }
      }
      PairSums unused_sums[2] = {};
      const RowStatistics* statistics = params.statistics + query_row + row;
      const TermPairs<kDType, false, 1, kStepTiles> pairs(params, sequence, head, first_query + row,
                                                          first_key + 2 * (lane & 3));
      pairs.Evaluate(visible, kept, false, products, dp, unused_sums,
                     [&](int, int, int e) { return statistics[8 * (e / 2)]; });
#pragma unroll
      for (int n = 0; n < kStepTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[n][e] += dp[0][n][e];
      }
    }
  }
  float* const target = static_cast<float*>(dbias.data) +
                        (is_per_batch ? batch_begin : 0) * dbias.batch_stride +
                        (is_per_head ? head_begin : 0) * dbias.head_stride;
#pragma unroll
  for (int n = 0; n < kStepTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int64_t row = first_query + 16 * warp + 8 * (e / 2) + (lane >> 2);
      const int64_t key = first_key + 8 * n + 2 * (lane & 3) + e % 2;
      if (row >= p.q_rows || key >= p.kv_rows) continue;
      target[(p.q_offset + row) * dbias.row_stride + (p.kv_offset + key) * dbias.column_stride] =
          sum[n][e] + 0.0f;
    }
  }
}

}  // namespace tandem::cuda

#endif  // TANDEM_BACKEND_CUDA_BACKWARD_BIAS_CUH_
