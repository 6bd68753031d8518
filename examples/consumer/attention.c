#include <stdio.h>
#include <tandem/tandem.h>

static float q_data[8 * 100 * 64], kv_data[2 * 300 * 64], out_data[8 * 100 * 64];

static tandem_tensor Tensor(void* data, int64_t heads, int64_t rows) {  // [1, heads, rows, 64]
  tandem_tensor tensor = {.struct_size = sizeof tensor,
                          .dtype = TANDEM_DTYPE_F32,
                          .device_type = TANDEM_DEVICE_CPU,
                          .rank = 4,
                          .data = data,
                          .shape = {1, heads, rows, 64},
                          .strides = {heads * rows * 64, rows * 64, 64, 1}};
  return tensor;
}

int main(void) {
  for (int i = 0; i < 2 * 300 * 64; ++i) kv_data[i] = 0.2f;
  tandem_tensor q = Tensor(q_data, 8, 100), kv = Tensor(kv_data, 2, 300);
  tandem_tensor out = Tensor(out_data, 8, 100);
  tandem_band_term causal = TANDEM_BAND_TERM_INIT;
  causal.alignment = TANDEM_ALIGN_BOTTOM_RIGHT;
  causal.right = 0;
  const tandem_mask_term* terms[] = {&causal.head};
  tandem_problem problem = TANDEM_PROBLEM_INIT;
  problem.layout = TANDEM_LAYOUT_BHSD;
  problem.q = &q;
  problem.k = problem.v = &kv;
  problem.mask_term_count = 1;
  problem.mask_terms = terms;
  tandem_outputs outputs = {sizeof outputs, 0, &out, NULL};
  if (tandem_attention(&problem, &outputs, NULL) != TANDEM_STATUS_OK) {
    fprintf(stderr, "%s\n", tandem_last_error());
    return 1;
  }
  printf("%g\n", out_data[0]); /* 0.2 */
  return 0;
}
