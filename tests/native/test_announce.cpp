// Messages that are announced first, written later, and published by another thread: what a device does.
#include <unistd.h>

#include <algorithm>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <functional>
#include <mutex>
#include <random>
#include <thread>
#include <utility>
#include <vector>

#include "ranks.h"

namespace blsrdma::test {
namespace {

constexpr std::uint64_t kBytes = 3000;

// Does what it is given one after another, each some time later: a stream.
class Stream {
 public:
  ~Stream() { finish(); }
  void put(std::function<void()> work) {
    {
      const std::lock_guard lock(mutex_);
      queue_.push_back(std::move(work));
    }
    more_.notify_one();
  }
  void finish() {
    if (!thread_.joinable()) return;
    put(nullptr);
    thread_.join();
  }

 private:
  void run() {
    std::mt19937 random(1);
    for (;;) {
      std::unique_lock lock(mutex_);
      more_.wait(lock, [&] { return !queue_.empty(); });
      const std::function<void()> work = std::move(queue_.front());
      queue_.pop_front();
      lock.unlock();
      if (!work) return;
      usleep(random() % 400);
      work();
    }
  }

  std::mutex mutex_;
  std::condition_variable more_;
  std::deque<std::function<void()>> queue_;
  std::thread thread_{[this] { run(); }};
};

std::uint64_t size_of(std::uint32_t source, std::uint32_t destination, std::uint64_t iteration) {
  return (iteration * 7 + source * 3 + destination) % 5 ? (iteration * 613 + source * 101 + destination * 977) % kBytes : 0;
}

// Every other message lies in the receiver's own memory, as if on its device.
bool on_device(const Path& path, std::uint32_t source, std::uint32_t destination, std::uint64_t iteration) {
  return path.in_place && (iteration + source + destination) % 2;
}

TEST_ON_PATHS(announced_and_published_later) {
  Settings settings{.path = path, .ranks = 3, .lag = 1, .window_bytes = kBytes};
  settings.device_bytes = kBytes;
  const std::uint32_t windows = 2 * (settings.lag + 1), ranks = settings.ranks;
  std::vector<std::byte> devices(std::uint64_t{ranks} * ranks * windows * kBytes);
  const auto device = [&](std::uint32_t receiver, std::uint32_t source, std::uint64_t i) {
    return devices.data() + ((std::uint64_t{receiver} * ranks + source) * windows + i % windows) * kBytes;
  };
  on_threads(ranks, [&](Meeting& meeting, std::uint32_t self) {
    Rank rank(meeting, self, settings);
    std::vector<std::byte> out(std::uint64_t{ranks} * windows * kBytes);  // sources of puts
    Stream stream;
    std::deque<std::uint64_t> held;
    const auto finish = [&] {
      const std::uint64_t i = held.front();
      held.pop_front();
      CHECK_OUTCOME(rank, rank->wait(i, soon()), ok);
      for (std::uint32_t q = 0; q < ranks; ++q) {
        CHECK_EQUAL(rank->length(i, q), size_of(q, self, i));
        if (q == self) continue;
        if (!on_device(path, q, self, i)) {
          check_message(rank, i, q, size_of(q, self, i));
          continue;
        }
        CHECK(rank->message(i, q) == nullptr);
        const std::byte* at = device(self, q, i);
        for (std::uint64_t k = 0; k < size_of(q, self, i); ++k) CHECK(at[k] == pattern(q, self, i, k));
      }
      rank->release(i);
    };
    for (std::uint64_t i = 0; i < 60; ++i) {
      CHECK_OUTCOME(rank, rank->begin(soon()), ok);
      if (held.size() > settings.lag) finish();
      std::vector<std::uint64_t> bytes(ranks);
      for (std::uint32_t q = 0; q < ranks; ++q) bytes[q] = size_of(self, q, i);
      CHECK_OUTCOME(rank, rank->announce(bytes.data(), 1, soon()), ok);
      held.push_back(i);
      std::vector<Exchange::Parcel> parcels(ranks);
      std::vector<std::byte*> to(ranks);
      for (std::uint32_t q = 0; q < ranks; ++q) {
        parcels[q].bytes = bytes[q];
        if (q == self) continue;
        to[q] = on_device(path, self, q, i) ? device(q, self, i) : rank->place(q, i);
        if (!to[q]) to[q] = out.data() + (std::uint64_t{q} * windows + i % windows) * kBytes;
        if (!on_device(path, self, q, i)) parcels[q].on_host = to[q];
      }
      stream.put([&rank, parcels, to, i, self] {
        for (std::uint32_t q = 0; q < to.size(); ++q) {
          if (to[q]) fill(to[q], parcels[q].bytes, self, q, i);
        }
        rank->publish(i, 1, parcels);
      });
    }
    while (!held.empty()) finish();
    stream.finish();
    CHECK_EQUAL(rank->published(), 60u);
    CHECK(rank.close());
  });
}

// What was announced and never published is not waited for once its sender has left; what was, arrives.
TEST_ON_PATHS(announced_and_never_published) {
  Settings settings{.path = path, .lag = 1, .window_bytes = kBytes};
  settings.device_bytes = kBytes;
  on_threads(2, [&](Meeting& meeting, std::uint32_t self) {
    Rank rank(meeting, self, settings);
    const std::uint64_t bytes[2] = {0, 0};
    std::vector<std::byte> out(1);
    for (std::uint64_t i = 0; i < 2; ++i) {
      CHECK_OUTCOME(rank, rank->announce(bytes, 1, soon()), ok);
      std::vector<Exchange::Parcel> parcels(2);
      parcels[1 - self].on_host = out.data();
      if (self == 0 || i == 0) rank->publish(i, 1, parcels);
    }
    CHECK_OUTCOME(rank, rank->wait(0, soon()), ok);
    if (self == 1) CHECK(rank.close());
    if (self == 0) {
      CHECK_OUTCOME(rank, rank->wait(1, soon()), peer_left);
      CHECK(rank.close());
    }
  });
}

// A header that speaks of device memory where there is none, or of more than a window holds, is no message.
TEST_ON_PATHS(device_messages_that_cannot_be) {
  for (const std::uint64_t device_bytes : {std::uint64_t{0}, kBytes}) {
    Settings settings{.path = path, .window_bytes = 64};
    settings.device_bytes = device_bytes;
    on_threads(2, [&](Meeting& meeting, std::uint32_t self) {
      Rank rank(meeting, self, settings);
      const std::uint64_t bytes[2] = {kBytes + 1, kBytes + 1};
      CHECK_OUTCOME(rank, rank->announce(bytes, 1, soon()), ok);
      std::vector<Exchange::Parcel> parcels(2);
      parcels[1 - self].bytes = kBytes + 1;
      rank->publish(0, 1, parcels);
      CHECK_OUTCOME(rank, rank->wait(0, soon()), corrupt);
      CHECK(rank->details().text.find(device_bytes ? "3001 bytes in a device window of 3000" : "unknown kind 2") !=
            std::string::npos);
      rank.close(Farewell::kErred, 0, "corrupt");
    });
  }
}

}  // namespace
}  // namespace blsrdma::test
