// A file that appears under its path whole, or not at all.
#ifndef TANDEM_CLI_OUTPUT_FILE_H_
#define TANDEM_CLI_OUTPUT_FILE_H_

#include <cstddef>
#include <string>

namespace tandem::cli {

// What is written goes to a temporary file beside the path; Commit() renames it, in place of a file
// that may be there. Without Commit() nothing stays. Every function throws BadInput.
class OutputFile {
 public:
  // Says early whether there is a directory that may be written to.
  explicit OutputFile(std::string path);
  ~OutputFile();
  OutputFile(const OutputFile&) = delete;
  OutputFile& operator=(const OutputFile&) = delete;

  void Write(const void* data, size_t size);
  void Commit();

 private:
  void Open();

  std::string path_;
  std::string temporary_;  // "" when there is no such file
  int descriptor_ = -1;
};

}  // namespace tandem::cli

#endif  // TANDEM_CLI_OUTPUT_FILE_H_
