#include <cstdio>
#include <tandem/tandem.hpp>
#include <vector>

int main() {
  std::vector<float> q(2 * 8 * 100 * 64, 0.1f), k(2 * 2 * 300 * 64, 0.2f), v(k), out(q.size());
  tandem::Problem problem(tandem::Layout::kBHSD, {q, {2, 8, 100, 64}}, {k, {2, 2, 300, 64}},
                          {v, {2, 2, 300, 64}});  // [batch, heads, rows, dim], 4 query heads a head
  problem.mask = tandem::Causal(tandem::Alignment::kBottomRight) & tandem::KvLengths({250, 0});
  tandem::Attention(problem, tandem::Tensor(out, {2, 8, 100, 64}));
  std::printf("%g %g\n", out.front(), out.back());  // 0.2, and 0 where every key is masked
}
