// Errors as sentences, put together without streams.
//
// A toolchain may link a second libstdc++ into the extension, whose streams then meet the locale
// of the process's own and crash. Strings and numbers need no locale.
#pragma once
#include <concepts>
#include <stdexcept>
#include <string>
#include <string_view>

namespace lcr_fast {

inline void append(std::string& text, std::string_view part) { text += part; }

template <std::integral T>
void append(std::string& text, T number) {
  text += std::to_string(number);
}

// Throw a std::runtime_error, which Python sees as a RuntimeError, of the parts in a row.
template <class... Parts>
[[noreturn, gnu::cold]] void fail(const Parts&... parts) {
  std::string text;
  (append(text, parts), ...);
  throw std::runtime_error(text);
}

// The parts are evaluated even where the condition holds; where they cannot be, use fail().
template <class... Parts>
void check(bool condition, const Parts&... parts) {
  if (!condition) [[unlikely]]
    fail(parts...);
}

}  // namespace lcr_fast
