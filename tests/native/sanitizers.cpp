// What the sanitizers' runtimes ask this program for; nothing in a build without them. What is suppressed, and why, stands in
// the file thread.suppressions; AddressSanitizer and UBSan need nothing suppressed.
#define ASKED extern "C" __attribute__((visibility("default"), used)) const char*

ASKED __asan_default_options() {
  return "detect_stack_use_after_return=1:strict_init_order=1";
}
ASKED __ubsan_default_options() { return "print_stacktrace=1"; }
ASKED __tsan_default_options() { return "suppressions=" SUPPRESSIONS ":report_mutex_bugs=0"; }
