// What the sanitizers' runtimes ask this program for; nothing in a build without them. What is suppressed, and why, stands in
// the file thread.suppressions; AddressSanitizer and UBSan need nothing suppressed.
#define ASKED extern "C" __attribute__((visibility("default"), used)) const char*

ASKED __asan_default_options() {
  return "detect_stack_use_after_return=1:strict_init_order=1";
}
ASKED __ubsan_default_options() { return "print_stacktrace=1"; }
// No sleep at the exit of a process, a second by default: UCX's destructor leaves its own thread running and frees what that
// works on (1.21, ucs_async_global_cleanup), which a process that leaks a worker on purpose survives only if it ends at once.
ASKED __tsan_default_options() { return "suppressions=" SUPPRESSIONS ":report_mutex_bugs=0:atexit_sleep_ms=0"; }
