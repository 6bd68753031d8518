// Every scalar, enumerator, count, list and combination that is not allowed.
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <limits>

#include "tests/api/call.h"

namespace tandem::test {
namespace {

struct BadValue {
  const char* name;
  bool packed;
  std::vector<std::string> says;
  std::function<void(Call&)> spoil;
};
std::ostream& operator<<(std::ostream& stream, const BadValue& value) {
  return stream << value.name;
}

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Writes element n of an i32, i64 or f32 tensor of the call's own case.
template <typename T>
void Write(const tandem_tensor* tensor, int64_t n, T value) {
  static_cast<T*>(tensor->data)[n * tensor->strides[tensor->rank - 1]] = value;
}

std::vector<BadValue> ProblemValues() {
  using S = Call;
  return {
      {"struct_size_0", false, {"struct_size", "0"}, [](S& s) { s.problem.struct_size = 0; }},
      {"layout_0", false, {"layout", "0"}, [](S& s) { s.problem.layout = 0; }},
      {"layout_4", false, {"layout", "4"}, [](S& s) { s.problem.layout = 4; }},
      {"layout_minus_1", false, {"layout", "-1"}, [](S& s) { s.problem.layout = -1; }},
      {"scale_nan",
       false,
       {"scale", "nan"},
       [](S& s) { s.problem.has_scale = 1, s.problem.scale = kNan; }},
      {"scale_inf",
       false,
       {"scale", "inf"},
       [](S& s) { s.problem.has_scale = 1, s.problem.scale = -kInfinity; }},
      {"has_scale_2", false, {"has_scale", "2"}, [](S& s) { s.problem.has_scale = 2; }},
      {"softcap_negative", false, {"softcap", "-1"}, [](S& s) { s.problem.softcap = -1.0f; }},
      {"softcap_nan", false, {"softcap", "nan"}, [](S& s) { s.problem.softcap = kNan; }},
      {"softcap_inf", false, {"softcap", "inf"}, [](S& s) { s.problem.softcap = kInfinity; }},
      {"dropout_1", false, {"dropout_rate", "1"}, [](S& s) { s.problem.dropout_rate = 1.0f; }},
      {"dropout_negative",
       false,
       {"dropout_rate", "-0.1"},
       [](S& s) { s.problem.dropout_rate = -0.1f; }},
      {"dropout_nan", false, {"dropout_rate", "nan"}, [](S& s) { s.problem.dropout_rate = kNan; }},
      {"term_count_negative",
       false,
       {"mask_term_count", "-1"},
       [](S& s) { s.problem.mask_term_count = -1; }},
      {"term_count_huge",
       false,
       {"mask_term_count"},
       [](S& s) { s.problem.mask_term_count = INT32_MAX; }},
      {"terms_null", false, {"mask_terms", "null"}, [](S& s) { s.problem.mask_terms = nullptr; }},
      {"term_null", false, {"mask_terms[1]", "null"}, [](S& s) { s.terms[1] = nullptr; }},
      {"alibi_alignment_0",
       false,
       {"alibi_alignment", "0"},
       [](S& s) { s.problem.alibi_alignment = 0; }},
      {"alibi_alignment_3",
       false,
       {"alibi_alignment", "3"},
       [](S& s) { s.problem.alibi_alignment = 3; }},
      {"q_offset_negative", false, {"q_offset", "-1"}, [](S& s) { s.problem.q_offset = -1; }},
      {"q_offset_beyond", false, {"q_offset", "1"}, [](S& s) { s.problem.q_offset = 1; }},
      {"kv_offset_beyond", false, {"kv_offset"}, [](S& s) { s.problem.kv_offset = INT64_MAX; }},
      {"global_q_len_short", false, {"q_offset"}, [](S& s) { s.problem.global_q_len = 5; }},
      {"global_kv_len_negative",
       false,
       {"global_kv_len", "-5"},
       [](S& s) { s.problem.global_kv_len = -5; }},
      {"global_kv_len_huge",
       false,
       {"global_kv_len"},
       [](S& s) { s.problem.global_kv_len = INT64_MAX; }},
      {"packed_with_offset", true, {"q_offset"}, [](S& s) { s.problem.q_offset = 1; }},
      {"packed_without_term",
       true,
       {"packed"},
       [](S& s) {
         s.terms.erase(s.terms.begin()), --s.problem.mask_term_count;
         s.problem.mask_terms = s.terms.data();
       }},
      {"packed_twice", true, {"PACKED", "once"}, [](S& s) { s.terms[1] = s.terms[0]; }},
      {"lengths_twice", false, {"LENGTHS", "once"}, [](S& s) { s.terms[0] = s.terms[2]; }},
      {"three_segments", false, {"segments"}, [](S& s) { s.terms[0] = s.terms[1] = s.terms[3]; }},
      {"heads_not_a_multiple",
       false,
       {"heads", "4", "3"},
       [](S& s) {
         s.Own(&s.problem.k).shape[1] = s.Own(&s.problem.v).shape[1] = 3;
         s.Own(&s.problem.k).strides[1] = s.Own(&s.problem.v).strides[1] = 0;
       }},
      {"no_key_heads", false, {"k", "heads"}, [](S& s) { s.Own(&s.problem.k).shape[1] = 0; }},
      {"no_dimensions",
       false,
       {"q", "head dimension"},
       [](S& s) { s.Own(&s.problem.q).shape[3] = 0; }},
      {"v_dtype_differs",
       false,
       {"v", "dtype"},
       [](S& s) { s.Own(&s.problem.v).dtype = TANDEM_DTYPE_BF16; }},
      {"k_rows_differ", false, {"v", "rows"}, [](S& s) { s.Own(&s.problem.v).shape[2] = 11; }},
      {"out_is_q",
       false,
       {"out", "q", "overlap"},
       [](S& s) {
         tandem_tensor& out = s.Own(&s.outputs.out);
         out.data = s.problem.q->data;
       }},
      {"out_overlaps_v",
       false,
       {"out", "v", "overlap"},
       [](S& s) {
         tandem_tensor& out = s.Own(&s.outputs.out);
         out.data = static_cast<float*>(s.problem.v->data) + 5;
       }},
      {"out_is_the_mask",
       false,
       {"out", "].mask", "overlap"},
       [](S& s) {
         s.Own(&s.Term<tandem_dense_term>(TANDEM_MASK_DENSE).mask).data = s.outputs.out->data;
       }},
      {"lse_is_out",
       false,
       {"lse", "out", "overlap"},
       [](S& s) { s.Own(&s.outputs.lse).data = s.outputs.out->data; }},
      {"out_overlaps_itself",
       false,
       {"out", "strides", "share"},
       [](S& s) { s.Own(&s.outputs.out).strides[1] = 0; }},
      {"out_rows_interleave",
       false,
       {"out", "strides"},
       [](S& s) { s.Own(&s.outputs.out).strides[2] = 3; }},
      {"lse_broadcast",
       false,
       {"lse", "strides"},
       [](S& s) { s.Own(&s.outputs.lse).strides[0] = 0; }},
      {"outputs_struct_size",
       false,
       {"outputs", "struct_size"},
       [](S& s) { s.outputs.struct_size = 3; }},
      {"bias_not_broadcastable",
       false,
       {"bias", "rows"},
       [](S& s) { s.Own(&s.problem.bias).shape[2] = 5; }},
      {"mask_not_broadcastable",
       false,
       {"mask_terms[4].mask", "heads"},
       [](S& s) { s.Own(&s.Term<tandem_dense_term>(TANDEM_MASK_DENSE).mask).shape[1] = 3; }},
  };
}

std::vector<BadValue> TermValues() {
  using S = Call;
  const auto band = [](S& s) -> tandem_band_term& {
    return s.Term<tandem_band_term>(TANDEM_MASK_BAND);
  };
  const auto blocks = [](S& s) -> tandem_block_sparse_term& {
    return s.Term<tandem_block_sparse_term>(TANDEM_MASK_BLOCK_SPARSE);
  };
  const auto packed = [](S& s) -> tandem_packed_term& {
    return s.Term<tandem_packed_term>(TANDEM_MASK_PACKED);
  };
  const auto lengths = [](S& s) -> tandem_lengths_term& {
    return s.Term<tandem_lengths_term>(TANDEM_MASK_LENGTHS);
  };
  return {
      {"term_size",
       false,
       {"mask_terms[0]", "struct_size"},
       [=](S& s) { band(s).head.struct_size = 8; }},
      {"term_size_of_another",
       false,
       {"struct_size"},
       [=](S& s) { blocks(s).head.struct_size += 8; }},
      {"kind_0", false, {"kind", "0"}, [=](S& s) { band(s).head.kind = 0; }},
      {"kind_8", false, {"kind", "8"}, [=](S& s) { band(s).head.kind = 8; }},
      {"kind_packed",
       false,
       {"PACKED", "THD"},
       [=](S& s) { band(s).head.kind = TANDEM_MASK_PACKED; }},
      {"alignment_0",
       false,
       {"mask_terms[0].alignment", "0"},
       [=](S& s) { band(s).alignment = 0; }},
      {"alignment_3", false, {"alignment", "3"}, [=](S& s) { band(s).alignment = 3; }},
      {"left_minus_2", false, {"left", "-2"}, [=](S& s) { band(s).left = -2; }},
      {"right_min", false, {"right"}, [=](S& s) { band(s).right = INT32_MIN; }},
      {"left_per_head_minus_2",
       false,
       {"left_per_head", "-2"},
       [=](S& s) { Write<int32_t>(band(s).left_per_head, 1, -2); }},
      {"q_length_negative",
       false,
       {"q_lengths[1]", "-1"},
       [=](S& s) { Write<int32_t>(lengths(s).q_lengths, 1, -1); }},
      {"q_length_beyond",
       false,
       {"q_lengths[0]", "11"},
       [=](S& s) { Write<int32_t>(lengths(s).q_lengths, 0, 11); }},
      {"kv_length_beyond",
       false,
       {"kv_lengths[1]", "13"},
       [=](S& s) { Write<int32_t>(lengths(s).kv_lengths, 1, 13); }},
      {"kv_length_max",
       false,
       {"kv_lengths[1]"},
       [=](S& s) { Write<int32_t>(lengths(s).kv_lengths, 1, INT32_MAX); }},
      {"q_block_0", false, {"q_block", "0"}, [=](S& s) { blocks(s).q_block = 0; }},
      {"kv_block_minus_1", false, {"kv_block", "-1"}, [=](S& s) { blocks(s).kv_block = -1; }},
      {"count_negative",
       false,
       {"counts[0, 0, 0]", "-1"},
       [=](S& s) { Write<int32_t>(blocks(s).counts, 0, -1); }},
      {"count_beyond",
       false,
       {"counts[0, 0, 0]"},
       [=](S& s) { Write<int32_t>(blocks(s).counts, 0, 4); }},
      {"index_negative",
       false,
       {"indices[0, 0, 0, 0]", "-1"},
       [=](S& s) {
         Write<int32_t>(blocks(s).counts, 0, 1), Write<int32_t>(blocks(s).indices, 0, -1);
       }},
      {"index_beyond",
       false,
       {"indices[0, 0, 0, 0]", "3"},
       [=](S& s) {
         Write<int32_t>(blocks(s).counts, 0, 1), Write<int32_t>(blocks(s).indices, 0, 3);
       }},
      {"full_index_beyond",
       false,
       {"full_indices[0, 0, 0, 0]"},
       [=](S& s) {
         Write<int32_t>(blocks(s).full_counts, 0, 1), Write<int32_t>(blocks(s).full_indices, 0, 99);
       }},
      {"cu_negative",
       true,
       {"cu_seqlens_q[0]", "-1"},
       [=](S& s) { Write<int32_t>(packed(s).cu_seqlens_q, 0, -1); }},
      {"cu_decreases",
       true,
       {"cu_seqlens_q[2]", "3"},
       [=](S& s) { Write<int32_t>(packed(s).cu_seqlens_q, 2, 3); }},
      {"cu_beyond",
       true,
       {"cu_seqlens_k[2]", "15"},
       [=](S& s) { Write<int32_t>(packed(s).cu_seqlens_k, 2, 15); }},
      {"cu_max",
       true,
       {"cu_seqlens_k[2]"},
       [=](S& s) { Write<int32_t>(packed(s).cu_seqlens_k, 2, INT32_MAX); }},
      {"max_q_len_short", true, {"max_q_len", "5"}, [=](S& s) { packed(s).max_q_len = 5; }},
      {"max_kv_len_beyond", true, {"max_kv_len", "15"}, [=](S& s) { packed(s).max_kv_len = 15; }},
      {"max_kv_len_negative", true, {"max_kv_len", "-1"}, [=](S& s) { packed(s).max_kv_len = -1; }},
      {"offset_negative",
       true,
       {"sequence_offsets[0]", "-1"},
       [](S& s) {
         Write<int64_t>(s.Term<tandem_dense_term>(TANDEM_MASK_DENSE).sequence_offsets, 0, -1);
       }},
      {"offset_beyond",
       true,
       {"sequence_offsets[1]"},
       [](S& s) {
         Write<int64_t>(s.Term<tandem_dense_term>(TANDEM_MASK_DENSE).sequence_offsets, 1, 1000);
       }},
      {"offset_max",
       true,
       {"sequence_offsets[1]"},
       [](S& s) {
         Write<int64_t>(s.Term<tandem_dense_term>(TANDEM_MASK_DENSE).sequence_offsets, 1,
                        INT64_MAX);
       }},
  };
}

std::vector<BadValue> OptionValues() {
  using S = Call;
  return {
      {"options_struct_size",
       false,
       {"options", "struct_size"},
       [](S& s) { s.options.struct_size = 0; }},
      {"device_type_minus_1",
       false,
       {"device_type", "-1"},
       [](S& s) { s.options.device_type = -1; }},
      {"device_type_4", false, {"device_type", "4"}, [](S& s) { s.options.device_type = 4; }},
      {"device_index_negative",
       false,
       {"device_index", "-1"},
       [](S& s) { s.options.device_index = -1; }},
      {"threads_negative", false, {"threads", "-1"}, [](S& s) { s.options.threads = -1; }},
      {"threads_max", false, {"threads"}, [](S& s) { s.options.threads = INT32_MAX; }},
      {"kernel_unknown",
       false,
       {"kernel", "flash_cpu.avx9000"},
       [](S& s) { s.options.kernel = "flash_cpu.avx9000"; }},
      {"kernel_empty", false, {"kernel"}, [](S& s) { s.options.kernel = ""; }},
      {"executor_size",
       false,
       {"executor"},
       [](S& s) {
         static tandem_executor executor = {};
         s.options.executor = &executor;
       }},
  };
}

class InvalidValueSmall : public ::testing::TestWithParam<BadValue> {};

TEST_P(InvalidValueSmall, IsRefusedByName) {
  Call call(GetParam().packed ? PackedSpec() : FullSpec());
  GetParam().spoil(call);
  call.ExpectRefused(TANDEM_STATUS_INVALID_ARGUMENT, GetParam().says);
}

const auto kNameOf = [](const auto& info) { return info.param.name; };
INSTANTIATE_TEST_SUITE_P(Problem, InvalidValueSmall, ::testing::ValuesIn(ProblemValues()), kNameOf);
INSTANTIATE_TEST_SUITE_P(Terms, InvalidValueSmall, ::testing::ValuesIn(TermValues()), kNameOf);
INSTANTIATE_TEST_SUITE_P(Options, InvalidValueSmall, ::testing::ValuesIn(OptionValues()), kNameOf);

TEST(InvalidCallSmall, NullPointers) {
  Call s(FullSpec());
  EXPECT_EQ(tandem_attention(nullptr, &s.outputs, nullptr), TANDEM_STATUS_INVALID_ARGUMENT);
  Call::ExpectMessage({"problem", "null"});
  EXPECT_EQ(tandem_attention(&s.problem, nullptr, nullptr), TANDEM_STATUS_INVALID_ARGUMENT);
  Call::ExpectMessage({"outputs", "null"});
  EXPECT_EQ(tandem_plan_create(&s.problem, &s.outputs, nullptr, nullptr, nullptr),
            TANDEM_STATUS_INVALID_ARGUMENT);
  Call::ExpectMessage({"plan", "null"});
  EXPECT_EQ(tandem_plan_run(nullptr, &s.problem, &s.outputs, nullptr, nullptr, 0, nullptr),
            TANDEM_STATUS_INVALID_ARGUMENT);
  EXPECT_EQ(tandem_mask_plan_size(&s.problem, nullptr, nullptr), TANDEM_STATUS_INVALID_ARGUMENT);
  Call::ExpectMessage({"size", "null"});
  EXPECT_EQ(tandem_explain(&s.problem, &s.outputs, nullptr, nullptr, nullptr),
            TANDEM_STATUS_INVALID_ARGUMENT);
  Call::ExpectMessage({"explanation", "null"});
  tandem_plan_destroy(nullptr);
  tandem_mask_plan_destroy(nullptr);
  tandem_explanation_destroy(nullptr);
}

// Extents whose products overflow are refused before anything is read or allocated.
TEST(InvalidCallSmall, OverflowingProducts) {
  Call s(CaseSpec{});
  for (const tandem_tensor** slot : {&s.problem.q, &s.problem.k, &s.problem.v, &s.outputs.out}) {
    tandem_tensor& tensor = s.Own(slot);
    tensor.shape[0] = int64_t{1} << 30;
    tensor.shape[1] = int64_t{1} << 23;
    tensor.shape[2] = (int64_t{1} << 31) - 100;
    for (int d = 0; d < 3; ++d) tensor.strides[d] = 0;
  }
  s.outputs.lse = nullptr;
  EXPECT_EQ(s.Attention(), TANDEM_STATUS_INVALID_ARGUMENT);
  EXPECT_STRNE(tandem_last_error(), "");
}

TEST(InvalidCallSmall, CudaWithoutAGpuSaysWhy) {
  const char* reason = tandem_device_unavailable_reason(TANDEM_DEVICE_CUDA);
  if (reason == nullptr) GTEST_SKIP() << "there is a GPU";
  Call s(FullSpec());
  s.options.device_type = TANDEM_DEVICE_CUDA;
  s.ExpectRefused(TANDEM_STATUS_DEVICE_UNAVAILABLE, {"cuda", reason});
  s.options.device_type = TANDEM_DEVICE_AUTO;  // then the CPU serves
  EXPECT_EQ(s.Attention(), TANDEM_STATUS_OK) << tandem_last_error();
  EXPECT_EQ(tandem_device_count(TANDEM_DEVICE_CUDA), 0);
  EXPECT_EQ(tandem_device_description(TANDEM_DEVICE_CUDA, 0), nullptr);
}

TEST(InvalidCallSmall, StatusStrings) {
  for (tandem_status status = TANDEM_STATUS_OK; status <= TANDEM_STATUS_INTERNAL; ++status) {
    EXPECT_STRNE(tandem_status_string(status), "");
  }
  EXPECT_STRNE(tandem_status_string(-1), nullptr);
  EXPECT_STRNE(tandem_status_string(1000), nullptr);
  EXPECT_STREQ(tandem_version(), TANDEM_VERSION_STRING);
}

}  // namespace
}  // namespace tandem::test
