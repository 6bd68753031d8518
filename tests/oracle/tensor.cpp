#include "tests/oracle/tensor.h"

#include <vector>

namespace tandem::oracle {

const double* HalfTable() {
  static const std::vector<double> table = [] {
    std::vector<double> values(65536);
    for (int bits = 0; bits < 65536; ++bits) {
      values[static_cast<size_t>(bits)] = HalfToDouble(static_cast<uint16_t>(bits));
    }
    return values;
  }();
  return table.data();
}

void LoadRow(const tandem_tensor& t, int64_t offset, int64_t stride, int64_t count, double* row) {
  switch (t.dtype) {
    case TANDEM_DTYPE_F32:
      for (int64_t d = 0; d < count; ++d) row[d] = LoadAs<float>(t.data, offset + d * stride);
      return;
    case TANDEM_DTYPE_F16: {
      const double* table = HalfTable();
      for (int64_t d = 0; d < count; ++d) {
        row[d] = table[LoadAs<uint16_t>(t.data, offset + d * stride)];
      }
      return;
    }
    case TANDEM_DTYPE_BF16:
      for (int64_t d = 0; d < count; ++d) {
        row[d] = Bfloat16ToDouble(LoadAs<uint16_t>(t.data, offset + d * stride));
      }
      return;
    default:
      for (int64_t d = 0; d < count; ++d) row[d] = LoadReal(t, offset + d * stride);
  }
}

}  // namespace tandem::oracle
