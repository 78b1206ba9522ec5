// Runs the tests, each in a process of its own, so that one that crashes, leaks or hangs spoils no other.
//
//   native_tests              all of them
//   native_tests tcp torn     those whose names contain one of these
//   native_tests --here NAME  one, in this process: for a debugger
//   native_tests --list
#include <signal.h>
#include <spawn.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <optional>
#include <thread>

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

struct Running {
  const Test* test;
  pid_t pid;
  int output;  // what it prints is shown where it fails
  std::uint64_t began;
};

pid_t start(std::vector<const char*> arguments, int output) {
  arguments.push_back(nullptr);
  pid_t pid = -1;
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_adddup2(&actions, output, 1);
  posix_spawn_file_actions_adddup2(&actions, output, 2);
  posix_spawnattr_t attributes;
  posix_spawnattr_init(&attributes);
  posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETPGROUP);  // ranks that a hanging test has forked end with it
  const int failed =
      posix_spawnp(&pid, arguments[0], &actions, &attributes, const_cast<char**>(arguments.data()), environ);
  posix_spawnattr_destroy(&attributes);
  posix_spawn_file_actions_destroy(&actions);
  return failed ? -1 : pid;
}

void add_stacks(const Running& running) {
  const std::string target = std::to_string(running.pid);
  const pid_t gdb =
      start({"gdb", "-p", target.c_str(), "-batch", "-ex", "thread apply all backtrace"}, running.output);
  if (gdb > 0) waitpid(gdb, nullptr, 0);
}

// "", or what went wrong; nothing while it runs.
std::optional<std::string> ended(const Running& running) {
  int status = 0;
  if (running.pid < 0) return "cannot be started";
  if (waitpid(running.pid, &status, WNOHANG) == 0) {
    if (now_ns() < running.began + kBoundSeconds * 1'000'000'000ull) return std::nullopt;
    add_stacks(running);
    kill(-running.pid, SIGKILL);
    waitpid(running.pid, &status, 0);
    return "did not end within " + std::to_string(kBoundSeconds) + " s";
  }
  kill(-running.pid, SIGKILL);  // whatever it has left behind
  if (WIFSIGNALED(status)) return std::string("ended by ") + strsignal(WTERMSIG(status));
  return WEXITSTATUS(status) ? "exit status " + std::to_string(WEXITSTATUS(status)) : "";
}

// Returns whether all passed. As many run at a time as there are cores: most of them mostly wait.
bool run(std::vector<const Test*> tests) {
  std::reverse(tests.begin(), tests.end());
  std::vector<Running> running;
  std::size_t passed = 0, failed = 0;
  while (!tests.empty() || !running.empty()) {
    while (!tests.empty() && running.size() < std::max(2u, std::thread::hardware_concurrency())) {
      const int output = memfd_create("output", MFD_CLOEXEC);
      running.push_back({tests.back(), start({"/proc/self/exe", "--here", tests.back()->name.c_str()}, output), output, now_ns()});
      tests.pop_back();
    }
    std::erase_if(running, [&](const Running& each) {
      const auto wrong = ended(each);
      if (!wrong) return false;
      ++(wrong->empty() ? passed : failed);
      std::printf("%s %5.2f s  %s\n", wrong->empty() ? "ok    " : "FAILED", double(now_ns() - each.began) / 1e9,
                  each.test->name.c_str());
      if (!wrong->empty()) {
        char text[4096];
        for (off_t at = 0; const ssize_t bytes = pread(each.output, text, sizeof text, at); at += bytes) {
          if (bytes < 0) break;
          std::fwrite(text, 1, static_cast<std::size_t>(bytes), stdout);
        }
        std::printf("FAILED %s: %s\n", each.test->name.c_str(), wrong->c_str());
      }
      std::fflush(stdout);
      close(each.output);
      return true;
    });
    usleep(1000);
  }
  std::printf("%zu passed, %zu failed\n", passed, failed);
  return failed == 0 && passed > 0;
}

}  // namespace

int main(int count, char** arguments) {
  const std::vector<std::string> names(arguments + 1, arguments + count);
  if (names.size() == 2 && names[0] == "--here") return run_here(names[1]);
  // UCX reads these when it is loaded, in the processes started below: it neither patches functions that a sanitizer has
  // replaced nor handles signals that the sanitizer or this program reports.
  setenv("UCX_MEM_EVENTS", "n", 0);
  setenv("UCX_HANDLE_ERRORS", "none", 0);
  std::vector<const Test*> chosen;
  const bool list = names == std::vector<std::string>{"--list"};
  for (const Test& test : all_tests()) {
    const auto within = [&](const std::string& part) { return test.name.find(part) != std::string::npos; };
    if (list) std::printf("%s\n", test.name.c_str());
    if (names.empty() || std::any_of(names.begin(), names.end(), within)) chosen.push_back(&test);
  }
  return list || run(chosen) ? EXIT_SUCCESS : EXIT_FAILURE;
}
