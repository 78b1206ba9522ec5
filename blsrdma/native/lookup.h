// Lookups without a collective: what one rank asks of the owners of tables, pair by pair, and its own serving of others.
//
// An ask is a set of bags of any tables. Bags whose rows can be read here (one's own tables, and those that are mapped) are
// pooled here; the others are asked for: request n to an owner goes into its window n % (lag + 1), the response comes into
// window n % (lag + 1) here, and its arrival is the acknowledgement. Request n is written when the response to n - lag - 1
// has been consumed, that is, copied to where the caller wants it. At most lag + 1 asks are incomplete at a time. Nobody
// waits for a rank whose rows it does not need, and a failed owner fails the asks that need it, and no others.
//
// An owner is asked for pooled bags, or (Config::fetch) for rows as they are stored, which are pooled here: then rows that
// occur twice are asked for once, and rows that are kept here (rows.h) not at all. Rows that UCX can get (getter.h) are
// wanted of their owner just so, but it is not asked for them.
//
// An ask is answered wholly from one version of the tables (versions.h).
//
// One thread at a time calls a Lookup; its server has a thread of its own (serve.h), or serves within these calls.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "arena.h"
#include "channel.h"
#include "doorbell.h"
#include "fabric.h"
#include "failure.h"
#include "getter.h"
#include "inbox.h"
#include "liveness.h"
#include "query.h"
#include "reader.h"
#include "rows.h"
#include "serve.h"
#include "turn.h"
#include "versions.h"
#include "wait.h"

namespace blsrdma {

struct AskStats {  // of one owner
  std::uint64_t requests = 0;
  std::uint64_t request_bytes = 0;
  std::uint64_t response_bytes = 0;
  std::uint64_t bags = 0;  // asked for, or read there, or one's own
  std::uint64_t rows = 0;
  std::uint64_t wait_ns = 0;   // waits in which it was missing
  std::uint64_t degraded = 0;  // bags that were answered with default rows
  std::uint64_t read = 0;      // bags that were read there
  // Where rows are fetched: how many were, and were not because they were kept, cached or wanted already.
  std::uint64_t fetched = 0, pinned = 0, cached = 0, repeated = 0;
};

// What a bag of a table that can be read here costs, in ns, by itself and for each of its rows.
struct Costs {
  double read_bag = 0, read_row = 0, ask_bag = 0, ask_row = 0;

  bool ask(const Part& part) const {
    const auto bags = static_cast<double>(part.bags), rows = static_cast<double>(part.offsets[part.bags] - part.offsets[0]);
    return bags * ask_bag + rows * ask_row < bags * read_bag + rows * read_row;
  }
};

class Lookup {
 public:
  struct Config {
    Geometry requests;
    Geometry responses;
    std::uint32_t rank = 0;
    std::uint32_t lag = 0;
    std::uint64_t epoch = 0;
    bool allow_direct = true;
    bool checksums = false;
    std::uint64_t version = 0;   // of the tables at the start
    bool second_place = false;   // arenas of tables have room for another version
    bool read = false;           // get: read the rows of owners where that is possible, and ask only the others
    bool fetch = false;          // ask for rows and pool them here
    bool dedupe = true;          // of these each once
    std::uint64_t cache_bytes = 0;
    bool serve_inline = false;   // within this rank's calls, else by a thread
    bool degrade = false;        // a failed owner's bags are answered with `instead`
    float instead = 0.0f;
    double share = 1.0;          // of a core, for the serving thread
    std::uint64_t keepalive_ns = kNever;
    WaitPolicy wait;
    WaitPolicy serving;
    std::function<bool()> interrupted;
  };
  struct Peer {
    PeerAddress requests;   // its request arena
    PeerAddress responses;  // its response arena
    PeerAddress tables;     // its arena of tables; no rkey: not to be read. Its pid counts, too
  };

  // `tables`: the same list on every rank; data of those that this rank owns, which lie in `table_memory` where others may
  // read them.
  Lookup(std::shared_ptr<Fabric> fabric, std::shared_ptr<Arena> requests, std::shared_ptr<Arena> responses,
         std::shared_ptr<Arena> table_memory, std::vector<Table> tables, const Config& config);
  ~Lookup();  // after close(); else what peers may still write is leaked on purpose
  Lookup(const Lookup&) = delete;
  Lookup& operator=(const Lookup&) = delete;

  // This rank's tables with these numbers lie in GPU memory: who pools them for others, and for its own asks. Before connect().
  void use(std::shared_ptr<GpuPooler> serving, std::shared_ptr<GpuPooler> own, const std::vector<std::uint32_t>& tables);

  // As Exchange::connect; then the serving thread is at work.
  void connect(const std::vector<Peer>& peers, std::vector<int> pidfds, std::uint64_t deadline_ns);

  // Ask for bags, and give the ask's number. Waits only while lag + 1 asks are incomplete. What the parts point to is read
  // and written until the ask is complete. Nothing has been asked unless the outcome is ok.
  Outcome ask(const std::vector<Part>& parts, std::uint64_t deadline_ns, std::uint64_t& number);
  // Wait until all bags of an ask are pooled. A failure stays with the ask until forget().
  Outcome wait(std::uint64_t number, std::uint64_t deadline_ns);
  bool ready(std::uint64_t number);  // whether wait() would return at once
  void forget(std::uint64_t number);
  std::vector<std::uint32_t> missing(std::uint64_t number) const;  // owners that have not answered it
  // Get rows of a table of another rank and keep them for ever. One's own, and tables that are read, need none of that.
  Outcome keep(std::uint32_t table, const std::int64_t* rows, std::uint64_t count, std::uint64_t deadline_ns);
  // Choose by these costs whether bags of a table are read or asked for; without, they are read where they can be.
  void prefer(std::uint32_t table, const Costs& costs) { costs_.at(table) = costs; }
  void forget_stats() { stats_.assign(stats_.size(), {}); }
  // No more asks: serve the others until they say the same, or have left.
  Outcome finish(std::uint64_t deadline_ns);

  // Another version of this rank's own tables, in two steps: wait for the place it may lie in, and when its rows are there,
  // announce it. `rows`: for each of all tables, where this rank's own lie. Asks go on meanwhile from the version before.
  // Versions rise; mismatch: another owner has loaded another one (details: its rank, a: its version).
  Outcome make_room(std::uint64_t version, std::uint64_t deadline_ns, std::uint32_t& place);
  bool load(std::uint64_t version, std::uint32_t place, const std::vector<const std::byte*>& rows);
  std::uint64_t version() const { return version_; }  // of the newest ask, and of the next if nobody announces another
  std::uint64_t loaded() const { return loaded_; }    // the newest of its own tables
  std::vector<std::uint32_t> behind();  // ranks that load() waits for
  bool retire_version();  // whether the one before is needed no more: then nothing reads it from here on

  const Details& details() const { return details_; }
  const Fault& fault() const { return fault_; }
  const AskStats& stats(std::uint32_t owner) const { return stats_[owner]; }
  const ServeStats& served(std::uint32_t client) const { return server_->stats(client); }
  bool direct(std::uint32_t peer) const { return peers_[peer].asking && peers_[peer].asking->direct(); }
  bool mapped(std::uint32_t owner) const { return peers_[owner].mapped; }
  bool gets(std::uint32_t owner) const { return peers_[owner].getter != nullptr; }
  bool readable(std::uint32_t owner) const { return peers_[owner].mapped || peers_[owner].reader || gets(owner); }
  std::string transport(std::uint32_t peer) const;
  std::uint64_t silence_ns(std::uint32_t peer) const { return liveness_ ? liveness_->silence_ns(peer) : 0; }
  std::uint64_t next() const { return next_; }
  const std::vector<Table>& tables() const { return tables_.at(place_); }

  // As Exchange::close.
  bool close(std::uint32_t code, std::uint32_t blamed, const std::string& text, std::uint64_t deadline_ns);

 private:
  struct Ask {
    std::uint64_t number = 0;
    std::uint64_t version = 0;
    std::vector<Part> parts;
    std::vector<const Part*> here;  // those that are pooled here
    std::uint32_t left = 0;  // owners that have not answered
    Outcome outcome = Outcome::ok;
    Details details;
    Fault fault;
  };
  // Bags that are pooled here once their rows are: where each row is, or will be.
  struct Gather {
    const Part* part = nullptr;
    std::vector<const std::byte*> rows;
    std::vector<std::uint64_t> missing;  // these are fetched, into the first slots of the buffer
    std::unique_ptr<std::byte[]> buffer;
    std::uint64_t capacity = 0;  // bytes
  };
  // What one ask wants of one owner.
  struct Job {
    std::uint64_t number = kNever;  // the ask's
    Ask* ask = nullptr;
    std::vector<const Part*> parts;
    Cursor cursor;
    std::uint64_t in_flight = 0;
    bool failed = false;
    bool rows = false;  // it asks for rows
    std::size_t used = 0;  // gathers
    std::vector<Gather> gathers;
    std::vector<Fetch> fetches;
    std::vector<const Part*> getting;        // parts whose rows are got, into gathers, too
    std::unique_ptr<Getter::Batch> batch;    // these rows
    bool written() const { return failed || cursor.part == (rows ? fetches.size() : parts.size()); }
    bool got() const { return getting.empty() || batch->done(); }
  };
  struct Slot {  // of a request that has been sent
    Job* job = nullptr;
    std::vector<Landing> landings;
    std::vector<FetchLanding> rows;
  };
  struct PeerState {
    Channel* asking = nullptr;       // requests to it
    Channel* answering = nullptr;    // responses to it
    ucp_rkey_h tables = nullptr;
    std::byte* mapped = nullptr;     // its tables
    Reader reader;                   // else: whether they can be read in its process's memory
    std::unique_ptr<Getter> getter;  // else: whether UCX gets them
    std::vector<std::vector<Gather>> unclaimed;  // of jobs that were given up: gets may still land in them
    std::uint64_t tables_there = 0;  // their arena, its own address
    std::vector<Job> jobs;           // job j at j % (lag + 1)
    std::uint64_t oldest = 0;        // incomplete job
    std::uint64_t writing = 0;       // job that has not been written into requests wholly
    std::uint64_t end = 0;
    std::uint64_t sent = 0;          // requests
    std::uint64_t received = 0;      // responses consumed
    std::vector<Slot> slots;
    std::vector<std::vector<std::byte>> staging;  // requests on their way, where they are put
    std::unique_ptr<Failure> failure;
    bool lost = false;               // it has failed, and all that was wanted of it, too
    bool owns = false;               // some table
    std::uint64_t announced = 0;     // the newest version that it has loaded
    std::uint64_t moved = 0;         // the version that it has moved on to
  };

  Outcome fail(Outcome outcome, std::uint32_t rank, std::string text = "");
  Outcome result(Ask& ask);
  bool reads(const Table& table) const;
  bool gets(const Table& table) const;
  Outcome open_ask(std::uint64_t deadline_ns, Ask*& ask);
  Job& job_for(PeerState& peer, Ask& ask);
  void collect(const Part& part, Gather& gather);
  void gather(const Part& part, Job& job);
  void read_apart(const Part& part, Ask& ask);
  void get_apart(const Part& part, Job& job);
  void open_getters(const std::vector<Peer>& peers, std::uint64_t deadline_ns);
  void drop_getters();
  Gather* gather_for(const Part& part, Job& job);
  void lose_read(std::uint32_t owner, const Part& part, Ask& ask, const std::string& text);
  std::string overwritten() const;
  void pool_gathered(const Gather& gather);
  bool pump();
  void pump(std::uint32_t owner);
  void consume(std::uint32_t owner, PeerState& peer);
  void write(std::uint32_t owner, PeerState& peer);
  void retire(std::uint32_t owner, PeerState& peer);
  void give_up(std::uint32_t owner, const Part& part, Ask& ask);
  void fill_in(std::uint32_t owner, const Part& part);
  void refused(std::uint32_t owner, Job& job, const Fault& fault);
  void lose(std::uint32_t owner, Outcome outcome, const std::string& text);
  void find_failures();
  Outcome until(const std::function<bool()>& done, std::uint64_t deadline_ns);
  void broken(std::uint32_t peer, std::string why);
  bool has_left(std::uint32_t peer) const;
  // Versions.
  bool gone(std::uint32_t peer) const;
  void look_at_versions(std::uint32_t peer);
  void adopt();
  void move_on();
  void tell_owners();

  std::shared_ptr<Fabric> fabric_;
  std::shared_ptr<Arena> requests_arena_;
  std::shared_ptr<Arena> responses_arena_;
  std::shared_ptr<Arena> tables_arena_;  // or none
  TableSets tables_;
  const Config config_;
  Inbox responses_;
  std::unique_ptr<Server> server_;
  std::unique_ptr<Liveness> liveness_;
  std::unique_ptr<Doorbell> request_bell_, response_bell_;
  std::vector<std::unique_ptr<Channel>> asking_, answering_;  // by rank; none for oneself
  std::vector<PeerState> peers_;
  std::vector<AskStats> stats_;
  std::vector<Costs> costs_;    // by table
  std::vector<KeptRows> kept_;  // by table
  RowIndex seen_;               // rows of one part
  Gather apart_;                // rows that are read in another process's memory
  std::vector<iovec> pieces_;
  std::map<std::uint64_t, std::unique_ptr<Ask>> asks_;
  std::vector<std::unique_ptr<Ask>> spare_;
  Scratch scratch_;
  std::shared_ptr<GpuPooler> serving_gpu_, own_gpu_;
  std::uint64_t next_ = 0;
  std::uint32_t place_ = 0;        // of the version that is asked for
  std::uint64_t version_ = 0;      // which one that is
  std::uint64_t loaded_ = 0;       // of this rank's own tables the newest
  bool owns_ = false;              // it has tables
  bool moved_ = true;              // nothing is incomplete of the version before
  bool finished_ = false;
  std::uint64_t adopted_at_ = 0;   // the first ask of version_
  bool remote_ = false;  // some peer is reached by puts
  std::atomic<bool> busy_{false};
  std::uint64_t asked_ns_ = 0;
  std::uint64_t looked_ns_ = 0;  // for failures
  Details details_;
  Fault fault_;
  bool closed_ = false;
};

}  // namespace blsrdma
