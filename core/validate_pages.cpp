#include "core/validate_pages.h"

#include "core/validate_outputs.h"

namespace tandem::core {

bool TakePages(const tandem_problem& input, bool needs_data, Checker* check, Problem* p) {
  const tandem_tensor &q = *input.q, &k = *input.k, &v = *input.v, &table = *input.block_table;
  if (!check->Tensor("block_table", &table, {TANDEM_DTYPE_I32}, {2}, needs_data)) return false;
  if (!check->SameDevice("block_table", table, "q", q)) return false;
  if (p->layout == Layout::kTHD) {
    return check->Fail("block_table is given, must be null with layout THD");
  }
  if (input.page_size < 1 || input.page_size != k.shape[1]) {
    return check->Fail("page_size is %lld, must be dimension 1 of k, %lld",
                       static_cast<long long>(input.page_size), static_cast<long long>(k.shape[1]));
  }
  p->kv_heads = k.shape[2];
  if (p->kv_heads < 1 || p->q_heads % p->kv_heads != 0) {
    return check->Fail("k: shape is %s; it has %lld heads, must divide the %lld heads of q",
                       ShapeString(k).c_str(), static_cast<long long>(p->kv_heads),
                       static_cast<long long>(p->q_heads));
  }
  if (!(check->Dimension("k", k, 3, p->qk_dim, "the head dimension of q") &&
        check->Dimension("v", v, 0, k.shape[0], "the pages of k") &&
        check->Dimension("v", v, 1, input.page_size, "page_size") &&
        check->Dimension("v", v, 2, p->kv_heads, "the heads of k") &&
        check->Dimension("block_table", table, 0, p->batch, "the batch of q"))) {
    return false;
  }
  if (k.shape[0] < 1 && table.shape[1] > 0) {
    return check->Fail("k: shape is %s; it has no pages, must have those that block_table names",
                       ShapeString(k).c_str());
  }
  if (table.shape[1] > kLongestSequence / input.page_size) {
    return check->Fail("block_table: shape is %s, must name below 2^31 - 64 keys a sequence",
                       ShapeString(table).c_str());
  }
  p->group = p->q_heads / p->kv_heads;
  p->q_rows = q.shape[p->layout == Layout::kBHSD ? 2 : 1];
  p->kv_rows = table.shape[1] * input.page_size;
  p->k = ViewOf(Layout::kBSHD, k);
  p->v = ViewOf(Layout::kBSHD, v);
  p->has_block_table = 1;
  p->page_table = {static_cast<const int32_t*>(table.data), table.strides[0], table.strides[1],
                   input.page_size, k.shape[0]};
  return true;
}

bool ListedPages(bool needs_data, Checker* check, const Problem& p) {
  if (!p.has_block_table || !needs_data || p.device_type != TANDEM_DEVICE_CPU) return true;
  for (int64_t b = 0; b < p.batch; ++b) {
    int32_t status = 0;
    const int64_t keys = LocalKeys(ResolveSequence(p, b, &status));
    for (int64_t n = 0; n < CeilDiv(keys, p.page_table.page_size); ++n) {
      status = 0;
      LoadPage(p.page_table, b, n, &status);
      if (status == 0) continue;
      const PageTable& table = p.page_table;
      return check->Fail("block_table[%lld][%lld] is %d, must be one of the %lld pages of k",
                         static_cast<long long>(b), static_cast<long long>(n),
                         table.pages[b * table.batch_stride + n * table.column_stride],
                         static_cast<long long>(table.page_count));
    }
  }
  return true;
}

}  // namespace tandem::core
