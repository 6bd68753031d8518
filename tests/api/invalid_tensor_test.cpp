// Every tensor argument x every way in which a tensor descriptor can be wrong.
#include <gtest/gtest.h>

#include <functional>

#include "tests/api/call.h"

namespace tandem::test {
namespace {

using Slot = std::function<const tandem_tensor**(Call&)>;

struct Argument {
  const char* name;
  bool packed;
  bool required;
  Slot slot;
};
std::ostream& operator<<(std::ostream& stream, const Argument& argument) {
  return stream << argument.name;
}

template <typename T>
Slot InTerm(tandem_mask_kind kind, const tandem_tensor* T::*field) {
  return [=](Call& s) { return &(s.Term<T>(kind).*field); };
}

std::vector<Argument> Arguments() {
  return {
      {"q", false, true, [](Call& s) { return &s.problem.q; }},
      {"k", false, true, [](Call& s) { return &s.problem.k; }},
      {"v", false, true, [](Call& s) { return &s.problem.v; }},
      {"out", false, true, [](Call& s) { return &s.outputs.out; }},
      {"lse", false, false, [](Call& s) { return &s.outputs.lse; }},
      {"bias", false, false, [](Call& s) { return &s.problem.bias; }},
      {"alibi_slopes", false, false, [](Call& s) { return &s.problem.alibi_slopes; }},
      {"sink", false, false, [](Call& s) { return &s.problem.sink; }},
      {"left_per_head", false, false, InTerm(TANDEM_MASK_BAND, &tandem_band_term::left_per_head)},
      {"right_per_head", false, false, InTerm(TANDEM_MASK_BAND, &tandem_band_term::right_per_head)},
      {"prefix", false, false, InTerm(TANDEM_MASK_BAND, &tandem_band_term::prefix)},
      {"ranges", false, true, InTerm(TANDEM_MASK_ROW_RANGES, &tandem_row_ranges_term::ranges)},
      {"q_lengths", false, false, InTerm(TANDEM_MASK_LENGTHS, &tandem_lengths_term::q_lengths)},
      {"kv_lengths", false, false, InTerm(TANDEM_MASK_LENGTHS, &tandem_lengths_term::kv_lengths)},
      {"q_segments", false, true, InTerm(TANDEM_MASK_SEGMENTS, &tandem_segments_term::q_segments)},
      {"kv_segments", false, true,
       InTerm(TANDEM_MASK_SEGMENTS, &tandem_segments_term::kv_segments)},
      {"mask", false, true, InTerm(TANDEM_MASK_DENSE, &tandem_dense_term::mask)},
      {"counts", false, true, InTerm(TANDEM_MASK_BLOCK_SPARSE, &tandem_block_sparse_term::counts)},
      {"indices", false, true,
       InTerm(TANDEM_MASK_BLOCK_SPARSE, &tandem_block_sparse_term::indices)},
      // One of the two full lists alone is an error too.
      {"full_counts", false, true,
       InTerm(TANDEM_MASK_BLOCK_SPARSE, &tandem_block_sparse_term::full_counts)},
      {"full_indices", false, true,
       InTerm(TANDEM_MASK_BLOCK_SPARSE, &tandem_block_sparse_term::full_indices)},
      {"cu_seqlens_q", true, true, InTerm(TANDEM_MASK_PACKED, &tandem_packed_term::cu_seqlens_q)},
      {"cu_seqlens_k", true, true, InTerm(TANDEM_MASK_PACKED, &tandem_packed_term::cu_seqlens_k)},
      {"sequence_offsets", true, false,
       InTerm(TANDEM_MASK_DENSE, &tandem_dense_term::sequence_offsets)},
  };
}

struct Corruption {
  const char* name;
  const char* says;  // beside the argument's name; null: nothing particular
  std::function<void(tandem_tensor&)> spoil;
};
std::ostream& operator<<(std::ostream& stream, const Corruption& corruption) {
  return stream << corruption.name;
}

std::vector<Corruption> Corruptions() {
  return {
      {"struct_size_0", "struct_size", [](tandem_tensor& t) { t.struct_size = 0; }},
      {"struct_size_small", "struct_size", [](tandem_tensor& t) { t.struct_size -= 8; }},
      {"struct_size_huge", "struct_size", [](tandem_tensor& t) { t.struct_size = 1u << 31; }},
      {"dtype_0", "dtype", [](tandem_tensor& t) { t.dtype = 0; }},
      {"dtype_minus_1", "dtype", [](tandem_tensor& t) { t.dtype = -1; }},
      {"dtype_99", "dtype", [](tandem_tensor& t) { t.dtype = 99; }},
      {"dtype_f64", "dtype", [](tandem_tensor& t) { t.dtype = TANDEM_DTYPE_F64; }},
      {"device_type_0", "device_type", [](tandem_tensor& t) { t.device_type = 0; }},
      {"device_type_minus_1", "device_type", [](tandem_tensor& t) { t.device_type = -1; }},
      {"device_type_auto", "device_type",
       [](tandem_tensor& t) { t.device_type = TANDEM_DEVICE_AUTO; }},
      {"other_device", "device", [](tandem_tensor& t) { t.device_type = TANDEM_DEVICE_CUDA; }},
      {"device_index_minus_1", "device_index", [](tandem_tensor& t) { t.device_index = -1; }},
      {"device_index_1", "device_index", [](tandem_tensor& t) { t.device_index = 1; }},
      {"rank_0", "rank", [](tandem_tensor& t) { t.rank = 0; }},
      {"rank_minus_1", "rank", [](tandem_tensor& t) { t.rank = -1; }},
      {"rank_6", "rank", [](tandem_tensor& t) { t.rank = 6; }},
      {"rank_max", "rank", [](tandem_tensor& t) { t.rank = INT32_MAX; }},
      {"data_null", "data", [](tandem_tensor& t) { t.data = nullptr; }},
      {"extent_minus_1", "shape", [](tandem_tensor& t) { t.shape[0] = -1; }},
      {"extent_min", "shape", [](tandem_tensor& t) { t.shape[t.rank - 1] = INT64_MIN; }},
      {"extent_max", nullptr, [](tandem_tensor& t) { t.shape[0] = INT64_MAX; }},
      {"extent_2_40", nullptr, [](tandem_tensor& t) { t.shape[0] = int64_t{1} << 40; }},
      {"extent_one_more", nullptr, [](tandem_tensor& t) { ++t.shape[0]; }},
      {"extent_one_less", nullptr,
       [](tandem_tensor& t) { t.shape[0] = t.shape[0] == 2 ? 0 : t.shape[0] - 1; }},
      {"stride_overflow", nullptr, [](tandem_tensor& t) { t.strides[0] = INT64_MAX; }},
      {"stride_min", nullptr, [](tandem_tensor& t) { t.strides[0] = INT64_MIN; }},
  };
}

using Parameter = std::tuple<Argument, Corruption>;
class InvalidTensorSmall : public ::testing::TestWithParam<Parameter> {};

TEST_P(InvalidTensorSmall, IsRefusedByName) {
  const auto& [argument, corruption] = GetParam();
  Call call(argument.packed ? PackedSpec() : FullSpec());
  ASSERT_EQ(call.Attention(), TANDEM_STATUS_OK) << tandem_last_error();
  corruption.spoil(call.Own(argument.slot(call)));
  std::vector<std::string> parts = {argument.name};
  if (corruption.says != nullptr) parts.push_back(corruption.says);
  call.ExpectRefused(TANDEM_STATUS_INVALID_ARGUMENT, parts);
}

INSTANTIATE_TEST_SUITE_P(Matrix, InvalidTensorSmall,
                         ::testing::Combine(::testing::ValuesIn(Arguments()),
                                            ::testing::ValuesIn(Corruptions())),
                         [](const ::testing::TestParamInfo<Parameter>& info) {
                           return std::string(std::get<0>(info.param).name) + "__" +
                                  std::get<1>(info.param).name;
                         });

class TensorArgumentSmall : public ::testing::TestWithParam<Argument> {};

TEST_P(TensorArgumentSmall, NullIsRefusedWhereItIsRequired) {
  const Argument& argument = GetParam();
  Call call(argument.packed ? PackedSpec() : FullSpec());
  *argument.slot(call) = nullptr;
  if (argument.required) {
    call.ExpectRefused(TANDEM_STATUS_INVALID_ARGUMENT, {argument.name, "null"});
  } else if (std::string(argument.name) != "sequence_offsets") {  // then the mask's rank is wrong
    EXPECT_EQ(call.Attention(), TANDEM_STATUS_OK) << tandem_last_error();
  }
}

TEST_P(TensorArgumentSmall, DataMustBeAlignedToItsElement) {
  const Argument& argument = GetParam();
  Call call(argument.packed ? PackedSpec() : FullSpec());
  tandem_tensor& tensor = call.Own(argument.slot(call));
  if (tensor.dtype == TANDEM_DTYPE_BOOL) return;
  tensor.data = static_cast<char*>(tensor.data) + 1;
  call.ExpectRefused(TANDEM_STATUS_INVALID_ARGUMENT, {argument.name, "aligned"});
}

INSTANTIATE_TEST_SUITE_P(Matrix, TensorArgumentSmall, ::testing::ValuesIn(Arguments()),
                         [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace tandem::test
