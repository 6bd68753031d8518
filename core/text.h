// A fixed-size message that crosses the plugin boundary: reasons of refusal and error texts.
#ifndef TANDEM_CORE_TEXT_H_
#define TANDEM_CORE_TEXT_H_

#include <stdarg.h>
#include <stdio.h>

namespace tandem::core {

struct Text {
  char data[512];
};

__attribute__((format(printf, 2, 3))) static inline void Format(Text* text, const char* format,
                                                                ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text->data, sizeof(text->data), format, arguments);
  va_end(arguments);
}

}  // namespace tandem::core

#endif  // TANDEM_CORE_TEXT_H_
