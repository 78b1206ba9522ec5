// A test is a function; a CHECK that does not hold throws. tests/native/main.cpp runs them.
#pragma once

#include <functional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

namespace blsrdma::test {

struct Test {
  std::string name;
  std::function<void()> body;
};

inline std::vector<Test>& all_tests() {
  static std::vector<Test> tests;
  return tests;
}

struct Registered {
  Registered(std::string name, std::function<void()> body) { all_tests().push_back({std::move(name), std::move(body)}); }
};

template <typename T>
std::string shown(const T& value) {
  std::ostringstream out;
  if constexpr (std::is_enum_v<T>) {
    out << static_cast<long long>(value);
  } else {
    out << value;
  }
  return out.str();
}

[[noreturn]] inline void failed(const char* file, int line, const std::string& what) {
  throw std::runtime_error(std::string(file) + ":" + std::to_string(line) + ": " + what);
}

template <typename A, typename B>
void check_equal(const A& a, const B& b, const char* file, int line, const char* text) {
  if (!(a == b)) failed(file, line, std::string(text) + " (" + shown(a) + ", " + shown(b) + ")");
}

}  // namespace blsrdma::test

#define TEST(name)                                                               \
  static void name();                                                            \
  static const ::blsrdma::test::Registered registered_##name{#name, [] { name(); }}; \
  static void name()

#define CHECK(condition)                                                                     \
  do {                                                                                       \
    if (!(condition)) ::blsrdma::test::failed(__FILE__, __LINE__, "not true: " #condition); \
  } while (false)

#define CHECK_EQUAL(a, b) ::blsrdma::test::check_equal((a), (b), __FILE__, __LINE__, "not equal: " #a ", " #b)

#define CHECK_THROWS(type, expression)                                             \
  do {                                                                             \
    bool thrown = false;                                                           \
    try {                                                                          \
      expression;                                                                  \
    } catch (const type&) {                                                        \
      thrown = true;                                                               \
    }                                                                              \
    if (!thrown) ::blsrdma::test::failed(__FILE__, __LINE__, "no " #type ": " #expression); \
  } while (false)
