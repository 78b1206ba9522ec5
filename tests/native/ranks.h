// Ranks of an exchange without Python: threads of one process, or processes; each with its own UCX context and worker,
// fabric, arena and exchange. What the rendezvous does in the product, a block of shared memory does here.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "arena.h"
#include "check.h"
#include "exchange.h"
#include "fabric.h"

namespace blsrdma::test {

// How bytes travel between ranks.
struct Path {
  const char* name;
  const char* tls;  // UCX_TLS
  bool allow_direct;
  // The peer's arena is used where it lies in this process instead of being mapped again (threads only). So a sanitizer
  // sees that both ranks touch the same memory.
  bool in_place = false;
  const char* devices = "all";  // UCX_NET_DEVICES
  bool direct() const { return allow_direct && std::string_view(tls).starts_with("posix"); }
};
inline constexpr Path kDirect{"direct", "posix,self", true};
inline constexpr Path kInPlace{"in_place", "posix,self", true, true};
inline constexpr Path kPosixPuts{"posix_puts", "posix,self", false};
inline constexpr Path kCmaPuts{"cma_puts", "posix,cma,self", false};
inline constexpr Path kTcp{"tcp", "tcp,self", false};  // by every interface: by several connections, where there are
inline constexpr Path kOneTcp{"one_tcp", "tcp,self", false, false, "lo"};
inline constexpr Path kPaths[] = {kDirect, kInPlace, kPosixPuts, kCmaPuts, kTcp, kOneTcp};

// Set by a thread: what it tries from here on says that it may not read another process's memory.
extern thread_local bool forbid_reading;

// A test with a path as its parameter, once for each.
bool on_every_path(const std::string& name, const std::function<void(const Path&)>& body);
#define TEST_ON_PATHS(name)                                                                             \
  static void name(const ::blsrdma::test::Path& path);                                                  \
  static const bool registered_##name = ::blsrdma::test::on_every_path(#name, name);                    \
  static void name([[maybe_unused]] const ::blsrdma::test::Path& path)

inline constexpr std::uint64_t kMs = 1'000'000;
inline std::uint64_t in_ms(std::uint64_t ms) { return deadline_after(ms * kMs); }
inline std::uint64_t soon() { return in_ms(30'000); }  // a wait that is bound to end well does so long before

// Where ranks meet: shared by threads and by forked processes.
class Meeting {
 public:
  static constexpr std::uint32_t kRanks = 8;
  struct Blob {
    char address[2048], rkey[512];
    std::size_t address_bytes, rkey_bytes;
    std::uint64_t arena;
    pid_t pid;
  };

  explicit Meeting(std::uint32_t ranks) : ranks_(ranks) {}
  void meet();  // until all ranks have called it; throws where one has failed
  void fail() { failed_ = true; }
  bool has_failed() const { return failed_; }

  Blob blobs[kRanks];
  std::atomic<std::uint64_t> words[kRanks]{};  // for the test's own use

 private:
  const std::uint32_t ranks_;
  std::atomic<std::uint32_t> arrived_{0};
  std::atomic<std::uint32_t> round_{0};
  std::atomic<bool> failed_{false};
};

// Run body(meeting, rank) on every rank and wait for all; throws what the first of them threw.
using Body = std::function<void(Meeting&, std::uint32_t)>;
void on_threads(std::uint32_t ranks, const Body& body);
// The same, each rank forked. `killed`: the rank that is expected to end by SIGKILL.
void on_processes(std::uint32_t ranks, const Body& body, std::optional<std::uint32_t> killed = {});

struct Settings {
  Path path = kDirect;
  std::uint32_t ranks = 2;
  std::uint32_t lag = 0;
  std::uint64_t window_bytes = 4096;
  bool copy_self = false;
  std::uint64_t epoch = 0x5eed'0123'4567'89abu;
  bool checksums = false;
  std::uint64_t device_bytes = 0;
  std::uint64_t keepalive_ns = kNever;
  WaitPolicy wait = {0, 200};
  std::function<bool()> interrupted;
};

// As WindowGeometry in blsrdma/windows.py; tests/test_windows.py compares the core with that.
Geometry geometry_of(const Settings& settings);

// A UCX context and worker, set up as blsrdma/fabric.py does it.
class Ucx {
 public:
  explicit Ucx(const Path& path);
  ~Ucx();
  Ucx(const Ucx&) = delete;
  Ucx& operator=(const Ucx&) = delete;

  ucp_context_h context = nullptr;
  ucp_worker_h worker = nullptr;
  std::string address;
};

// What a process has once, for all its exchanges.
struct Node {
  explicit Node(const Path& path) : ucx(std::make_shared<Ucx>(path)), fabric(std::make_shared<Fabric>(ucx->worker, ucx)) {}
  std::shared_ptr<Ucx> ucx;
  std::shared_ptr<Fabric> fabric;
};

// One rank of one exchange.
class Rank {
 public:
  // Connected when it returns. All ranks of the meeting make theirs at the same time.
  Rank(Meeting& meeting, std::uint32_t self, const Settings& settings);
  Rank(Meeting& meeting, std::uint32_t self, const Settings& settings, const Node& node);
  ~Rank();  // where the test has failed, the others learn it

  Exchange& operator*() { return *exchange; }
  Exchange* operator->() { return exchange.get(); }
  bool close() { return close(Farewell::kClosed, 0, "it closed the exchange"); }
  bool close(std::uint32_t code, std::uint32_t blamed, const std::string& text, std::uint64_t deadline = soon());
  void quarantine();  // after a close() that came to nothing, others may still write: leak what they write into
  // Post one message of `bytes` pattern bytes to every rank; the buffer is kept until the rank goes.
  Outcome post_pattern(std::uint64_t bytes, std::uint64_t deadline = soon());

  const Settings settings;
  const Geometry geometry;
  const std::uint32_t self;
  Node node;
  std::shared_ptr<Arena> arena;
  std::unique_ptr<Exchange> exchange;

 private:
  Meeting& meeting_;
  std::vector<std::vector<std::byte>> kept_;
  bool closed_ = false;
};

// The outcome of a call; where it is another one, the failure says what the exchange says of it.
#define CHECK_OUTCOME(rank, call, outcome)                                                                     \
  ::blsrdma::test::check_outcome(rank, (call), ::blsrdma::Outcome::outcome, __FILE__, __LINE__, #call " is not " #outcome)
void check_outcome(Rank& rank, Outcome is, Outcome expected, const char* file, int line, const char* text);

// Every byte says who sent it to whom, when, and where in the message it stands.
std::byte pattern(std::uint32_t source, std::uint32_t destination, std::uint64_t iteration, std::uint64_t offset);
void fill(std::byte* at, std::uint64_t bytes, std::uint32_t source, std::uint32_t destination, std::uint64_t iteration);
// Throws unless rank `source`'s message of `iteration` has `bytes` bytes and every one is right.
void check_message(Rank& rank, std::uint64_t iteration, std::uint32_t source, std::uint64_t bytes);
// Wait for an iteration; large messages are pulled into memory that lives as long as `memory`.
using Memory = std::vector<std::vector<std::byte>>;
Outcome receive(Rank& rank, std::uint64_t iteration, Memory& memory, std::uint64_t deadline = soon());

}  // namespace blsrdma::test
