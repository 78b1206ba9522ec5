// Large messages that their receiver reads out of the sender's memory: pieces, refusals, and where the system forbids it.
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "ranks.h"
#include "reader.h"

namespace blsrdma::test {
namespace {

constexpr Path kTcpReads{"tcp_reads", "tcp,self", true};
const std::uint64_t kPage = static_cast<std::uint64_t>(sysconf(_SC_PAGESIZE));

std::uint64_t address(const void* at) { return reinterpret_cast<std::uintptr_t>(at); }

// Pages that the test may take away again.
struct Pages {
  explicit Pages(std::uint64_t count)
      : bytes(count * kPage),
        data(static_cast<std::byte*>(mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0))) {
    CHECK(data != MAP_FAILED);
  }
  ~Pages() { munmap(data, bytes); }
  std::uint64_t bytes;
  std::byte* data;
};

TEST(a_reader_opens_by_a_trial) {
  const std::string token = "a token";
  Reader reader;
  CHECK(!reader);
  CHECK(!reader.open(0, address(token.data()), token));
  CHECK(!reader.open(getpid(), address(token.data()), "b token"));
  CHECK(!reader.open(getpid(), 8, token));
  CHECK(reader.open(getpid(), address(token.data()), token));
  CHECK(bool(reader));
  forbid_reading = true;
  CHECK(!reader.open(getpid(), address(token.data()), token));
  forbid_reading = false;
}

TEST(what_cannot_be_read_is_told) {
  const std::string token(200, 'x');
  const pid_t child = fork();
  if (child == 0) {
    pause();
    _exit(0);
  }
  Reader reader;
  CHECK(reader.open(child, address(token.data()), token));
  std::vector<std::byte> here(3 * kPage);
  CHECK_EQUAL(reader.read(here.data(), 0, 0), 0);
  CHECK_EQUAL(reader.read(here.data(), 100, 16), EFAULT);
  CHECK_EQUAL(reader.read(here.data(), 100, ~std::uint64_t{0} - 200), EFAULT);
  Pages some(3);
  CHECK_EQUAL(reader.read(here.data(), 10, address(some.data)), EFAULT);  // mapped here only, after the fork
  kill(child, SIGKILL);
  waitpid(child, nullptr, 0);
  CHECK_EQUAL(reader.read(here.data(), 100, address(token.data())), ESRCH);
  std::memset(some.data, 7, some.bytes);
  CHECK(reader.open(getpid(), address(token.data()), token));
  CHECK_EQUAL(reader.read(here.data(), some.bytes, address(some.data)), 0);
  CHECK(here.front() == std::byte{7} && here.back() == std::byte{7});
  munmap(some.data + 2 * kPage, kPage);  // read in part: as good as not at all
  CHECK_EQUAL(reader.read(here.data(), some.bytes, address(some.data)), EFAULT);
}

void each_way(const Path& path, std::optional<std::uint32_t> forbidden) {
  on_threads(2, [&](Meeting& meeting, std::uint32_t self) {
    forbid_reading = forbidden == self;
    Rank rank(meeting, self, {.path = path, .lag = 1, .window_bytes = 64});
    forbid_reading = false;
    CHECK_EQUAL(rank->reads(1 - self), forbidden != self);
    for (std::uint64_t i = 0; i < 8; ++i) {
      if (i >= 2) rank->release(i - 2);
      CHECK_OUTCOME(rank, rank.post_pattern(100'000 >> i), ok);
      Memory memory;
      CHECK_EQUAL(receive(rank, i, memory), Outcome::ok);
      check_message(rank, i, 1 - self, 100'000 >> i);
    }
    CHECK(rank.close());
  });
}

TEST(who_may_read_reads) {
  for (const Path& path : {kDirect, kTcpReads}) each_way(path, std::nullopt);
}

TEST(who_may_not_read_gets) {
  for (const Path& path : {kDirect, kTcpReads}) each_way(path, 1);
}

// A deadline that has passed stops a large message after a piece; the next call goes on from there.
TEST(pieces_add_up) {
  on_threads(2, [](Meeting& meeting, std::uint32_t self) {
    Rank rank(meeting, self, {.window_bytes = 64});
    constexpr std::uint64_t kBytes = 40 << 20;
    CHECK_OUTCOME(rank, rank.post_pattern(kBytes), ok);
    CHECK_OUTCOME(rank, rank->wait(0, soon()), large);
    std::vector<std::byte> memory(kBytes);
    CHECK_OUTCOME(rank, rank->pull(0, {{1 - self, memory.data()}}, now_ns()), timeout);
    CHECK(!rank->sent(0));
    CHECK_OUTCOME(rank, rank->pull(0, {}, now_ns()), timeout);
    CHECK_OUTCOME(rank, rank->pull(0, {}, soon()), ok);
    CHECK_OUTCOME(rank, rank->wait(0, soon()), ok);
    check_message(rank, 0, 1 - self, kBytes);
    // Of the next one a piece, and no more.
    rank->release(0);
    CHECK_OUTCOME(rank, rank.post_pattern(kBytes), ok);
    CHECK_OUTCOME(rank, rank->wait(1, soon()), large);
    CHECK_OUTCOME(rank, rank->pull(1, {{1 - self, memory.data()}}, now_ns()), timeout);
    meeting.meet();
    rank->release(1);
    for (const std::uint64_t deadline = soon(); !rank->sent(1); usleep(100)) CHECK(now_ns() < deadline);
    CHECK_OUTCOME(rank, rank.post_pattern(10), ok);
    CHECK_OUTCOME(rank, rank->wait(2, soon()), ok);
    CHECK(rank.close());
  });
}

TEST(a_buffer_that_is_gone_is_told) {
  on_threads(2, [](Meeting& meeting, std::uint32_t self) {
    Rank rank(meeting, self, {.window_bytes = 64});
    Pages pages(2);
    const std::int64_t counts[] = {0, self == 0 ? static_cast<std::int64_t>(pages.bytes) : 0};
    CHECK_EQUAL(rank->post(pages.data, self == 0 ? pages.bytes : 0, 1, counts, 1, soon()), Outcome::ok);
    if (self == 0) munmap(pages.data + kPage, kPage);
    meeting.meet();
    if (self == 1) {
      Memory memory;
      CHECK_EQUAL(receive(rank, 0, memory), Outcome::corrupt);
      CHECK_EQUAL(rank->details().rank, 0u);
      CHECK_EQUAL(rank->details().text, "its large message cannot be read: Bad address");
    }
    CHECK(rank.close());
  });
}

}  // namespace
}  // namespace blsrdma::test
