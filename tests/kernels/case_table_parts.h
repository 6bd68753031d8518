// What the parts of the table of cases share.
#ifndef TANDEM_TESTS_KERNELS_CASE_TABLE_PARTS_H_
#define TANDEM_TESTS_KERNELS_CASE_TABLE_PARTS_H_

#include <array>
#include <string>
#include <utility>
#include <vector>

#include "tests/kernels/case_table.h"

namespace tandem::test {

inline constexpr std::array<tandem_dtype, 3> kTypes = {TANDEM_DTYPE_F32, TANDEM_DTYPE_F16,
                                                       TANDEM_DTYPE_BF16};
inline constexpr tandem_alignment kTopLeft = TANDEM_ALIGN_TOP_LEFT;
inline constexpr tandem_alignment kBottomRight = TANDEM_ALIGN_BOTTOM_RIGHT;

inline std::string Name(tandem_dtype dtype) {
  return dtype == TANDEM_DTYPE_F32 ? "f32" : (dtype == TANDEM_DTYPE_F16 ? "f16" : "bf16");
}

inline CaseSpec Base(std::string name, tandem_dtype dtype = TANDEM_DTYPE_F32) {
  CaseSpec spec;
  spec.name = std::move(name);
  spec.dtype = dtype;
  spec.batch = 2;
  spec.q_heads = 2;
  spec.kv_heads = 2;
  spec.q_rows = 65;
  spec.kv_rows = 130;
  return spec;
}

class Table {
 public:
  void Add(CaseSpec spec) {
    spec.seed = cases_.size() + 1;
    cases_.push_back(std::move(spec));
  }
  std::vector<CaseSpec> Take() { return std::move(cases_); }

 private:
  std::vector<CaseSpec> cases_;
};

// case_table_masks.cpp
void AddTerms(Table* table);
void AddEmpty(Table* table);
// case_table_tiles.cpp
void AddSeveralTiles(Table* table);
void AddWideHeads(Table* table);
void AddScoreTerms(Table* table);

}  // namespace tandem::test

#endif  // TANDEM_TESTS_KERNELS_CASE_TABLE_PARTS_H_
