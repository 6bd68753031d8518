#include "cli/report.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <nlohmann/json.hpp>

#include "cli/errors.h"
#include "cli/options.h"

namespace tandem::cli {
namespace {

using Json = nlohmann::ordered_json;

template <typename... Arguments>
std::string Print(const char* format, Arguments... arguments) {
  char text[256];
  snprintf(text, sizeof(text), format, arguments...);
  return text;
}

const char* DtypeName(tandem_dtype dtype) {
  switch (dtype) {
    case TANDEM_DTYPE_F32:
      return "f32";
    case TANDEM_DTYPE_F16:
      return "f16";
    case TANDEM_DTYPE_BF16:
      return "bf16";
    default:
      return "f64";
  }
}

const char* LayoutName(tandem_layout layout) {
  if (layout == TANDEM_LAYOUT_THD) return "thd";
  return layout == TANDEM_LAYOUT_BSHD ? "bshd" : "bhsd";
}

const char* TermName(tandem_mask_kind kind) {
  switch (kind) {
    case TANDEM_MASK_BAND:
      return "band";
    case TANDEM_MASK_ROW_RANGES:
      return "row_ranges";
    case TANDEM_MASK_LENGTHS:
      return "lengths";
    case TANDEM_MASK_PACKED:
      return "packed";
    case TANDEM_MASK_SEGMENTS:
      return "segments";
    case TANDEM_MASK_DENSE:
      return "dense";
    default:
      return "block_sparse";
  }
}

std::vector<std::string> TermNames(const tandem_problem& problem) {
  std::vector<std::string> names;
  for (int32_t t = 0; t < problem.mask_term_count; ++t) {
    names.push_back(TermName(problem.mask_terms[t]->kind));
  }
  return names;
}

template <typename T>
Json OrNull(const std::optional<T>& value) {
  return value.has_value() ? Json(*value) : Json(nullptr);
}

// A scale as it will be used.
double ScaleOf(const tandem_problem& problem, const oracle::Dimensions& d) {
  return problem.has_scale != 0 ? static_cast<double>(problem.scale)
                                : 1.0 / std::sqrt(static_cast<double>(d.qk_dim));
}

Json ProblemJson(const Report& report) {
  const tandem_problem& problem = *report.problem;
  const oracle::Dimensions d = oracle::DimensionsOf(problem);
  Json json;
  json["layout"] = LayoutName(problem.layout);
  json["dtype"] = DtypeName(problem.q->dtype);
  json["batch"] = d.batch;
  json["q_heads"] = d.q_heads;
  json["kv_heads"] = d.kv_heads;
  json["q_rows"] = d.q_rows;
  json["kv_rows"] = d.kv_rows;
  json["qk_dim"] = d.qk_dim;
  json["v_dim"] = d.v_dim;
  json["scale"] = ScaleOf(problem, d);
  json["softcap"] = problem.softcap;
  json["mask"] = TermNames(problem);
  json["bias"] = problem.bias != nullptr;
  json["alibi"] = problem.alibi_slopes != nullptr;
  json["sink"] = problem.sink != nullptr;
  json["dropout"] = problem.dropout_rate;
  json["rows"] = report.mask.has_value() ? Json(report.mask->rows) : Json(nullptr);
  json["visible_pairs"] =
      report.mask.has_value() ? Json(report.mask->visible_pairs) : Json(nullptr);
  return json;
}

const char* PassName(Pass pass) { return pass == Pass::kForward ? "forward" : "backward"; }

Json ResultJson(const Result& result) {
  Json json;
  json["kernel"] = result.kernel;
  json["pass"] = PassName(result.pass);
  json["device"] = DeviceName(result.device);
  json["time_ms"] = OrNull(result.time_ms);
  json["repeats"] = result.repeats;
  json["tflops"] = OrNull(result.tflops);
  json["max_error"] = OrNull(result.max_error);
  json["error_over_bound"] = OrNull(result.error_over_bound);
  json["empty_rows"] = OrNull(result.empty_rows);
  json["in_contract"] = OrNull(result.in_contract);
  json["declined"] = result.declined.empty() ? Json(nullptr) : Json(result.declined);
  return json;
}

std::string TimeText(double ms) {
  if (ms < 1) return Print("%.1f us", ms * 1e3);
  if (ms < 1000) return Print("%.3f ms", ms);
  return Print("%.3f s", ms / 1e3);
}

std::string ProblemLine(const Report& report) {
  const tandem_problem& problem = *report.problem;
  const oracle::Dimensions d = oracle::DimensionsOf(problem);
  std::string line = Print(
      "%s %s: %s %lld, heads %lld (keys %lld), rows %lld, keys %lld, head dim %lld",
      LayoutName(problem.layout), DtypeName(problem.q->dtype), d.packed ? "sequences" : "batch",
      static_cast<long long>(d.batch), static_cast<long long>(d.q_heads),
      static_cast<long long>(d.kv_heads), static_cast<long long>(d.q_rows),
      static_cast<long long>(d.kv_rows), static_cast<long long>(d.qk_dim));
  if (d.v_dim != d.qk_dim) line += Print(" (values %lld)", static_cast<long long>(d.v_dim));
  for (const std::string& name : TermNames(problem)) line += ", " + name;
  if (problem.bias != nullptr) line += ", bias";
  return line;
}

}  // namespace

double Tflops(const tandem_problem& problem, const oracle::MaskCount& mask, Pass pass,
              double time_ms) {
  const oracle::Dimensions d = oracle::DimensionsOf(problem);
  const int64_t products = pass == Pass::kForward ? d.qk_dim + d.v_dim : 3 * d.qk_dim + 2 * d.v_dim;
  const double operations =
      2.0 * static_cast<double>(products) * static_cast<double>(mask.visible_pairs);
  return time_ms > 0 ? operations / time_ms * 1e-9 : 0;
}

void PrintJson(const Report& report) {
  Json results = Json::array();
  for (const Result& result : report.results) results.push_back(ResultJson(result));
  Json json;
  json["problem"] = ProblemJson(report);
  json["results"] = results;
  printf("%s\n", json.dump(2, ' ', false, Json::error_handler_t::replace).c_str());
}

void FlushStdout() {
  if (fflush(stdout) != 0 || ferror(stdout) != 0) {
    throw BadInput("standard output cannot be written");
  }
}

void PrintColumns(const std::vector<std::vector<std::string>>& rows) {
  std::vector<size_t> widths;
  for (const std::vector<std::string>& row : rows) {
    widths.resize(std::max(widths.size(), row.size()));
    for (size_t n = 0; n < row.size(); ++n) widths[n] = std::max(widths[n], row[n].size());
  }
  for (const std::vector<std::string>& row : rows) {
    std::string line;
    for (size_t n = 0; n < row.size(); ++n) {
      line += row[n];
      if (n + 1 < row.size()) line.append(widths[n] - row[n].size() + 2, ' ');
    }
    printf("%s\n", line.c_str());
  }
}

void PrintTable(const Report& report) {
  printf("%s\n", ProblemLine(report).c_str());
  std::vector<std::vector<std::string>> rows = {{"kernel", "pass", "device", "time", "TFLOP/s",
                                                 "max error", "error/bound", "empty rows", ""}};
  for (const Result& r : report.results) {
    if (!r.time_ms.has_value()) continue;
    std::string verdict;
    if (r.in_contract.has_value()) verdict = *r.in_contract ? "ok" : "OUT OF CONTRACT";
    std::string empty = "-";
    if (r.empty_rows.has_value() && report.mask.has_value()) {
      empty = Print("%lld of %lld", static_cast<long long>(*r.empty_rows),
                    static_cast<long long>(report.mask->rows));
    }
    rows.push_back({r.kernel, PassName(r.pass), DeviceName(r.device), TimeText(*r.time_ms),
                    r.tflops.has_value() ? Print("%.3g", *r.tflops) : "-",
                    r.max_error.has_value() ? Print("%.2e", *r.max_error) : "-",
                    r.error_over_bound.has_value() ? Print("%.3f", *r.error_over_bound) : "-",
                    empty, verdict});
  }
  if (rows.size() > 1) PrintColumns(rows);
  for (const Result& r : report.results) {
    if (!r.problem.empty()) printf("%s: %s\n", r.kernel.c_str(), r.problem.c_str());
  }
  bool first = true;
  for (const Result& r : report.results) {
    if (r.declined.empty()) continue;
    if (first) printf("declined:\n");
    first = false;
    printf("  %s (%s): %s\n", r.kernel.c_str(), DeviceName(r.device), r.declined.c_str());
  }
}

}  // namespace tandem::cli
