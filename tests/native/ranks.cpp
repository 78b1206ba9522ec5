#include "ranks.h"

#include <dlfcn.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>

namespace {

// Held wherever UCX may map or unmap memory. The sanitizers see nothing of it, and so not that what one rank has written to
// an address came before what another writes there when it is mapped anew.
std::recursive_mutex mapping;
bool map_in_place = false;                   // see Path
std::map<ucp_rkey_h, std::uint64_t> mapped;  // arenas that are used in place, by the keys to them

template <typename Function>
Function* next(const char* name) {
  return reinterpret_cast<Function*>(dlsym(RTLD_NEXT, name));
}

}  // namespace

// The core's calls of these functions come here; UCX's own are behind them.
#define CALL(type) extern "C" __attribute__((visibility("default"))) type

CALL(ucs_status_t) ucp_rkey_ptr(ucp_rkey_h rkey, uint64_t remote, void** local) {
  static const auto ucx = next<decltype(ucp_rkey_ptr)>("ucp_rkey_ptr");
  const std::lock_guard lock(mapping);
  if (!map_in_place) return ucx(rkey, remote, local);
  mapped[rkey] = remote;
  *local = reinterpret_cast<void*>(remote);
  return UCS_OK;
}
CALL(ucs_status_t) ucp_mem_map(ucp_context_h context, const ucp_mem_map_params_t* params, ucp_mem_h* memory) {
  static const auto ucx = next<decltype(ucp_mem_map)>("ucp_mem_map");
  const std::lock_guard lock(mapping);
  return ucx(context, params, memory);
}
CALL(ucs_status_t) ucp_mem_unmap(ucp_context_h context, ucp_mem_h memory) {
  static const auto ucx = next<decltype(ucp_mem_unmap)>("ucp_mem_unmap");
  ucp_mem_attr_t attributes{};
  attributes.field_mask = UCP_MEM_ATTR_FIELD_ADDRESS;
  ucp_mem_query(memory, &attributes);
  const auto address = reinterpret_cast<std::uint64_t>(attributes.address);
  for (;; usleep(200)) {  // a peer's mapping of its own would outlive this one
    const std::lock_guard lock(mapping);
    const auto here = [&](const auto& each) { return each.second == address; };
    if (std::none_of(mapped.begin(), mapped.end(), here)) return ucx(context, memory);
  }
}
CALL(ucs_status_t) ucp_ep_rkey_unpack(ucp_ep_h endpoint, const void* packed, ucp_rkey_h* rkey) {
  static const auto ucx = next<decltype(ucp_ep_rkey_unpack)>("ucp_ep_rkey_unpack");
  const std::lock_guard lock(mapping);
  return ucx(endpoint, packed, rkey);
}
CALL(void) ucp_rkey_destroy(ucp_rkey_h rkey) {
  static const auto ucx = next<decltype(ucp_rkey_destroy)>("ucp_rkey_destroy");
  const std::lock_guard lock(mapping);
  mapped.erase(rkey);
  ucx(rkey);
}
// UCX 1.21 has this call write over the very iovec that describes it (gone since openucx/ucx#11720), which the sanitizers'
// interceptor then believes. This one comes before theirs.
CALL(ssize_t) process_vm_readv(pid_t pid, const iovec* local, unsigned long locals, const iovec* remote,
                                   unsigned long remotes, unsigned long flags) noexcept {
  if (blsrdma::test::forbid_reading) {
    errno = EPERM;
    return -1;
  }
  return syscall(SYS_process_vm_readv, pid, local, locals, remote, remotes, flags);
}

namespace blsrdma::test {

thread_local bool forbid_reading = false;

namespace {

int open_pidfd(pid_t pid) { return static_cast<int>(syscall(SYS_pidfd_open, pid, 0)); }

std::shared_ptr<Meeting> shared_meeting(std::uint32_t ranks) {
  if (ranks > Meeting::kRanks) throw std::invalid_argument("too many ranks");
  void* memory = mmap(nullptr, sizeof(Meeting), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::system_error(errno, std::generic_category(), "mmap");
  return {new (memory) Meeting(ranks), [](Meeting* meeting) { munmap(meeting, sizeof(Meeting)); }};
}

}  // namespace

bool on_every_path(const std::string& name, const std::function<void(const Path&)>& body) {
  for (const Path& path : kPaths) Registered(name + "." + path.name, [body, &path] { body(path); });
  return true;
}

void Meeting::meet() {
  const std::uint64_t deadline = in_ms(60'000);
  const std::uint32_t round = round_;
  if (++arrived_ == ranks_) {
    arrived_ = 0;
    ++round_;
    return;
  }
  while (round_ == round) {
    if (failed_) throw std::runtime_error("another rank failed");
    if (now_ns() >= deadline) throw std::runtime_error("the others do not come");
    usleep(200);
  }
}

void on_threads(std::uint32_t ranks, const Body& body) {
  const auto meeting = shared_meeting(ranks);
  std::mutex mutex;
  std::string first;
  std::vector<std::thread> threads;
  for (std::uint32_t rank = 0; rank < ranks; ++rank) {
    threads.emplace_back([&, rank] {
      try {
        body(*meeting, rank);
      } catch (const std::exception& error) {
        const std::lock_guard lock(mutex);
        std::fprintf(stderr, "rank %u: %s\n", rank, error.what());  // now: what follows may end it all
        if (first.empty()) first = "rank " + std::to_string(rank) + ": " + error.what();
        meeting->fail();
      }
    });
  }
  for (auto& thread : threads) thread.join();
  if (!first.empty()) throw std::runtime_error(first);
}

void on_processes(std::uint32_t ranks, const Body& body, std::optional<std::uint32_t> killed) {
  const auto meeting = shared_meeting(ranks);
  std::vector<pid_t> pids;
  for (std::uint32_t rank = 0; rank < ranks; ++rank) {
    const pid_t pid = fork();
    if (pid < 0) throw std::system_error(errno, std::generic_category(), "fork");
    if (pid == 0) {
      int status = EXIT_SUCCESS;
      try {
        body(*meeting, rank);
      } catch (const std::exception& error) {
        std::fprintf(stderr, "rank %u: %s\n", rank, error.what());
        meeting->fail();
        status = EXIT_FAILURE;
      }
      std::exit(status);  // a sanitizer has its say
    }
    pids.push_back(pid);
  }
  std::string wrong;
  for (std::uint32_t left = ranks; left > 0; --left) {
    int status = 0;
    const pid_t pid = waitpid(-1, &status, 0);
    const auto rank = static_cast<std::uint32_t>(std::find(pids.begin(), pids.end(), pid) - pids.begin());
    if (rank == killed ? WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL : status == 0) continue;
    meeting->fail();
    wrong += " rank " + std::to_string(rank) +
             (WIFSIGNALED(status) ? std::string(" ended by ") + strsignal(WTERMSIG(status)) : std::string(" failed"));
  }
  if (!wrong.empty()) throw std::runtime_error(wrong);
}

Geometry geometry_of(const Settings& settings) {
  const auto lines = [](std::uint64_t bytes) { return (bytes + kLine - 1) / kLine * kLine; };
  const std::uint64_t sources = settings.ranks - (settings.copy_self ? 0 : 1);
  Geometry it;
  it.ranks = settings.ranks;
  it.windows = 2 * (settings.lag + 1);
  it.window_bytes = settings.window_bytes;
  it.window_stride = kHeaderBytes + std::max(kLeastPayload, lines(settings.window_bytes));
  it.control_offset = 2 * kLine;
  it.windows_offset = it.control_offset + settings.ranks * kControlBytes;
  it.staging_offset = it.windows_offset + sources * it.windows * it.window_stride;
  it.arena_bytes = it.staging_offset + settings.ranks * (kStagingBytes + it.windows * (kHeaderBytes + kLeastPayload));
  return it;
}

Ucx::Ucx(const Path& path) {
  ucp_config_t* config = nullptr;
  check(ucp_config_read(nullptr, nullptr, &config), "ucp_config_read");
  const std::pair<const char*, const char*> values[] = {
      {"TLS", path.tls}, {"NET_DEVICES", path.devices}, {"RNDV_THRESH", "inf"}, {"POSIX_ERROR_HANDLING", "y"}, {"SYSV_ERROR_HANDLING", "y"}};
  for (const auto& [name, value] : values) check(ucp_config_modify(config, name, value), name);
  ucp_params_t params{};
  params.field_mask = UCP_PARAM_FIELD_FEATURES;
  params.features = UCP_FEATURE_RMA | UCP_FEATURE_AMO64 | UCP_FEATURE_WAKEUP;
  const ucs_status_t made = ucp_init(&params, config, &context);
  ucp_config_release(config);
  check(made, "ucp_init");
  ucp_worker_params_t worker_params{};
  worker_params.field_mask = UCP_WORKER_PARAM_FIELD_THREAD_MODE;
  worker_params.thread_mode = UCS_THREAD_MODE_MULTI;  // as ucxx's
  check(ucp_worker_create(context, &worker_params, &worker), "ucp_worker_create");
  ucp_address_t* mine = nullptr;
  std::size_t bytes = 0;
  check(ucp_worker_get_address(worker, &mine, &bytes), "ucp_worker_get_address");
  address.assign(reinterpret_cast<const char*>(mine), bytes);
  ucp_worker_release_address(worker, mine);
}

Ucx::~Ucx() {
  if (worker) ucp_worker_destroy(worker);
  if (context) ucp_cleanup(context);
}

Rank::Rank(Meeting& meeting, std::uint32_t self, const Settings& settings)
    : Rank(meeting, self, settings, Node(settings.path)) {}

Rank::Rank(Meeting& meeting, std::uint32_t self, const Settings& settings, const Node& node)
    : settings(settings),
      geometry(geometry_of(settings)),
      self(self),
      node(node),
      arena(std::make_shared<Arena>(node.ucx->context, node.ucx, geometry.arena_bytes)),
      meeting_(meeting) {
  {
    const std::lock_guard lock(mapping);
    map_in_place = settings.path.in_place;
  }
  const auto token = [](std::uint32_t rank) { return std::string(kLine, static_cast<char>('A' + rank)); };
  std::memcpy(arena->data(), token(self).data(), kLine);
  Exchange::Config config;
  config.geometry = geometry;
  config.rank = self;
  config.lag = settings.lag;
  config.epoch = settings.epoch;
  config.copy_self = settings.copy_self;
  config.allow_direct = settings.path.allow_direct;
  config.checksums = settings.checksums;
  config.device_bytes = settings.device_bytes;
  config.keepalive_ns = settings.keepalive_ns;
  config.wait = settings.wait;
  config.interrupted = settings.interrupted;
  exchange = std::make_unique<Exchange>(node.fabric, arena, config);

  const std::string rkey = arena->packed_rkey();
  Meeting::Blob& mine = meeting.blobs[self];
  CHECK(node.ucx->address.size() <= sizeof mine.address && rkey.size() <= sizeof mine.rkey);
  std::memcpy(mine.address, node.ucx->address.data(), mine.address_bytes = node.ucx->address.size());
  std::memcpy(mine.rkey, rkey.data(), mine.rkey_bytes = rkey.size());
  mine.arena = reinterpret_cast<std::uintptr_t>(arena->data());
  mine.pid = getpid();
  meeting.meet();
  std::vector<PeerAddress> peers;
  std::vector<int> pidfds(settings.ranks, -1);
  for (std::uint32_t q = 0; q < settings.ranks; ++q) {
    if (q == self) continue;
    const Meeting::Blob& blob = meeting.blobs[q];
    PeerAddress peer;
    peer.rank = q;
    peer.worker_address.assign(blob.address, blob.address_bytes);
    peer.rkey.assign(blob.rkey, blob.rkey_bytes);
    peer.arena = blob.arena;
    peer.token = token(q);
    peer.pid = blob.pid;
    peers.push_back(peer);
    if (blob.pid != getpid()) pidfds[q] = open_pidfd(blob.pid);
  }
  exchange->connect(peers, pidfds, soon());
  meeting.meet();  // the blobs are free again, and everybody is connected
}

Rank::~Rank() {
  if (!exchange || closed_) return;
  meeting_.fail();
  try {
    if (exchange->close(Farewell::kErred, 0, "the test failed", in_ms(500))) return;
  } catch (const std::exception&) {
  }
  quarantine();
}

void Rank::quarantine() {
  exchange.release();
  new std::pair(arena, node);
}

bool Rank::close(std::uint32_t code, std::uint32_t blamed, const std::string& text, std::uint64_t deadline) {
  closed_ = true;
  return exchange->close(code, blamed, text, deadline);
}

Outcome Rank::post_pattern(std::uint64_t bytes, std::uint64_t deadline) {
  std::vector<std::byte> buffer(bytes * settings.ranks);
  for (std::uint32_t q = 0; q < settings.ranks; ++q) fill(buffer.data() + q * bytes, bytes, self, q, exchange->next());
  const std::vector<std::int64_t> counts(settings.ranks, static_cast<std::int64_t>(bytes));
  const Outcome outcome = exchange->post(buffer.data(), buffer.size(), 1, counts.data(), 1, deadline);
  kept_.push_back(std::move(buffer));
  return outcome;
}

void check_outcome(Rank& rank, Outcome is, Outcome expected, const char* file, int line, const char* text) {
  if (is == expected) return;
  const Details& it = rank->details();
  failed(file, line, std::string(text) + " but " + shown(is) + ": rank " + shown(it.rank) + ", iteration " +
                         shown(it.iteration) + ", " + it.text);
}

std::byte pattern(std::uint32_t source, std::uint32_t destination, std::uint64_t iteration, std::uint64_t offset) {
  const std::uint64_t seed = source * 1'000'003u + destination * 10'007u + iteration * 101u;
  return static_cast<std::byte>(((offset + seed) * 0x9e3779b97f4a7c15u) >> 56);
}

void fill(std::byte* at, std::uint64_t bytes, std::uint32_t source, std::uint32_t destination, std::uint64_t iteration) {
  for (std::uint64_t i = 0; i < bytes; ++i) at[i] = pattern(source, destination, iteration, i);
}

void check_message(Rank& rank, std::uint64_t iteration, std::uint32_t source, std::uint64_t bytes) {
  CHECK_EQUAL(rank->length(iteration, source), bytes);
  const std::byte* message = rank->message(iteration, source);
  for (std::uint64_t i = 0; i < bytes; ++i) {
    if (message[i] == pattern(source, rank.self, iteration, i)) continue;
    failed(__FILE__, __LINE__, "byte " + std::to_string(i) + " of " + std::to_string(bytes) + " from rank " +
                                   std::to_string(source) + " in iteration " + std::to_string(iteration) + " is wrong");
  }
}

Outcome receive(Rank& rank, std::uint64_t iteration, Memory& memory, std::uint64_t deadline) {
  Outcome outcome = rank->wait(iteration, deadline);
  if (outcome != Outcome::large) return outcome;
  std::vector<std::pair<std::uint32_t, std::byte*>> into;
  for (std::uint32_t q = 0; q < rank.settings.ranks; ++q) {
    if (q == rank.self || rank->message(iteration, q)) continue;
    memory.emplace_back(rank->length(iteration, q));
    into.emplace_back(q, memory.back().data());
  }
  return rank->pull(iteration, into, deadline);
}

}  // namespace blsrdma::test
