// Runs the tests, each in a process of its own, so that one that crashes, leaks or hangs spoils no other.
//
//   native_tests              all of them
//   native_tests tcp torn     those whose names contain one of these
//   native_tests --here NAME  one, in this process: for a debugger
//   native_tests --list
#include <signal.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>

#include "check.h"
#include "wait.h"

using namespace blsrdma;
using namespace blsrdma::test;

namespace {

constexpr unsigned kBoundSeconds = 120;  // of one test, under the slowest sanitizer on a busy machine

int run_here(const std::string& name) {
  for (const Test& test : all_tests()) {
    if (test.name != name) continue;
    try {
      test.body();
      return EXIT_SUCCESS;
    } catch (const std::exception& error) {
      std::fprintf(stderr, "%s\n", error.what());
      return EXIT_FAILURE;
    }
  }
  std::fprintf(stderr, "no test is called %s\n", name.c_str());
  return EXIT_FAILURE;
}

pid_t start(std::vector<const char*> arguments) {
  arguments.push_back(nullptr);
  pid_t pid = -1;
  // A process group of its own, so that ranks that a hanging test has forked end with it.
  posix_spawnattr_t attributes;
  posix_spawnattr_init(&attributes);
  posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETPGROUP);
  if (posix_spawnp(&pid, arguments[0], nullptr, &attributes, const_cast<char**>(arguments.data()), environ) != 0) pid = -1;
  posix_spawnattr_destroy(&attributes);
  return pid;
}

void print_stacks(pid_t pid) {
  const std::string target = std::to_string(pid);
  const pid_t gdb = start({"gdb", "-p", target.c_str(), "-batch", "-ex", "thread apply all backtrace"});
  if (gdb > 0) waitpid(gdb, nullptr, 0);
}

// "" or what went wrong.
std::string run(const Test& test) {
  const pid_t pid = start({"/proc/self/exe", "--here", test.name.c_str()});
  if (pid < 0) return "cannot be started";
  const std::uint64_t deadline = deadline_after(kBoundSeconds * 1'000'000'000ull);
  int status = 0;
  while (waitpid(pid, &status, WNOHANG) == 0) {
    if (now_ns() >= deadline) {
      print_stacks(pid);
      kill(-pid, SIGKILL);
      waitpid(pid, &status, 0);
      return "did not end within " + std::to_string(kBoundSeconds) + " s";
    }
    usleep(2000);
  }
  kill(-pid, SIGKILL);  // whatever it has left behind
  if (WIFSIGNALED(status)) return std::string("ended by ") + strsignal(WTERMSIG(status));
  if (WEXITSTATUS(status) != 0) return "exit status " + std::to_string(WEXITSTATUS(status));
  return "";
}

}  // namespace

int main(int count, char** arguments) {
  const std::vector<std::string> names(arguments + 1, arguments + count);
  if (names.size() == 2 && names[0] == "--here") return run_here(names[1]);
  // UCX reads these when it is loaded, in the processes started below: it neither patches functions that a sanitizer has
  // replaced nor handles signals that the sanitizer or this program reports.
  setenv("UCX_MEM_EVENTS", "n", 0);
  setenv("UCX_HANDLE_ERRORS", "none", 0);
  int failures = 0, passed = 0;
  for (const Test& test : all_tests()) {
    const auto within = [&](const std::string& part) { return test.name.find(part) != std::string::npos; };
    if (names == std::vector<std::string>{"--list"}) {
      std::printf("%s\n", test.name.c_str());
      continue;
    }
    if (!names.empty() && std::none_of(names.begin(), names.end(), within)) continue;
    const std::uint64_t began = now_ns();
    const std::string wrong = run(test);
    std::printf("%s %5.2f s  %s%s%s\n", wrong.empty() ? "ok    " : "FAILED", double(now_ns() - began) / 1e9,
                test.name.c_str(), wrong.empty() ? "" : ": ", wrong.c_str());
    std::fflush(stdout);
    ++(wrong.empty() ? passed : failures);
  }
  if (passed + failures) std::printf("%d passed, %d failed\n", passed, failures);
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
