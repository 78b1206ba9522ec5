// The bindings of Lookup; see module.cpp.
#include "module_lookup.h"

#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cstring>
#include <memory>
#include <tuple>

#include "arrays.h"
#include "lookup.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace blsrdma {
namespace {

std::uint64_t deadline(std::int64_t timeout_ns) {
  return timeout_ns < 0 ? kNever : deadline_after(static_cast<std::uint64_t>(timeout_ns));
}

bool interrupted() {
  const nb::gil_scoped_acquire gil;
  return PyErr_CheckSignals() != 0;
}

template <typename Call>
int without_gil(Call&& call) {
  Outcome outcome;
  {
    const nb::gil_scoped_release release;
    outcome = call();
  }
  if (outcome == Outcome::interrupted) throw nb::python_error();
  return static_cast<int>(outcome);
}

// table, mean, indices, count, offsets, bags, weights, out, stride: addresses as numbers, 0 for none.
using PartTuple = std::tuple<std::uint32_t, bool, std::uintptr_t, std::uint64_t, std::uintptr_t, std::uint64_t, std::uintptr_t,
                             std::uintptr_t, std::uint64_t>;

std::vector<Part> parts_of(const std::vector<PartTuple>& tuples) {
  std::vector<Part> parts;
  parts.reserve(tuples.size());
  for (const auto& [table, mean, indices, count, offsets, bags, weights, out, stride] : tuples) {
    parts.push_back({table, mean, reinterpret_cast<const std::int64_t*>(indices), count,
                     reinterpret_cast<const std::int64_t*>(offsets), bags, reinterpret_cast<const float*>(weights),
                     reinterpret_cast<float*>(out), stride});
  }
  return parts;
}

// The plain case without a Python frame between: bags of contiguous arrays or tensors of the right types, all with as many
// bags and as wide rows as `out`, a contiguous float32 array [bags, tables, dim]. False: it is another case.
bool plain_parts(const Lookup& lookup, nb::sequence bags, nb::handle out, nb::dict numbers, bool mean,
                 std::vector<Part>& parts) {
  static PyObject* const names[] = {PyUnicode_InternFromString("table"), PyUnicode_InternFromString("indices"),
                                    PyUnicode_InternFromString("offsets"), PyUnicode_InternFromString("weights")};
  constexpr std::uint64_t kInt64 = 'i' | 8 << 8, kFloat32 = 'f' | 4 << 8;
  Buffer place;
  const std::size_t count = nb::len(bags);
  if (!describe(out.ptr(), place) || place.dimensions != 3 || place.tag != kFloat32 || !place.writable ||
      static_cast<std::size_t>(place.trailing[0]) != count) {
    return false;
  }
  const auto dim = static_cast<std::uint64_t>(place.trailing[1]);
  parts.reserve(count);
  for (std::size_t k = 0; k < count; ++k) {
    const nb::object each = bags[k];
    nb::object fields[4];
    for (int f = 0; f < 4; ++f) {
      fields[f] = nb::steal(PyObject_GetAttr(each.ptr(), names[f]));
      if (!fields[f].is_valid()) throw nb::python_error();
    }
    PyObject* number = PyDict_GetItem(numbers.ptr(), fields[0].ptr());  // borrowed
    Buffer indices, offsets, weights;
    if (!number || !describe(fields[1].ptr(), indices) || !describe(fields[2].ptr(), offsets) || indices.dimensions != 1 ||
        offsets.dimensions != 1 || indices.tag != kInt64 || offsets.tag != kInt64 || offsets.items != place.items + 1) {
      return false;
    }
    const bool weighted = !fields[3].is_none();
    if (weighted && (!describe(fields[3].ptr(), weights) || weights.dimensions != 1 || weights.tag != kFloat32 ||
                     weights.items != indices.items)) {
      return false;
    }
    const auto table = static_cast<std::uint32_t>(PyLong_AsUnsignedLong(number));
    if (lookup.tables()[table].dim != dim) return false;
    parts.push_back({table, mean, reinterpret_cast<const std::int64_t*>(indices.address),
                     static_cast<std::uint64_t>(indices.items), reinterpret_cast<const std::int64_t*>(offsets.address),
                     static_cast<std::uint64_t>(place.items), reinterpret_cast<const float*>(weights.address),
                     reinterpret_cast<float*>(place.address) + k * dim, count * dim});
  }
  return true;
}

// One bag after another of one table, as pool() does it, with the instructions named: for tests.
void pool_with_instructions(const std::string& instructions, std::uint32_t format, std::uint32_t dim, std::uintptr_t rows,
                            const PartTuple& tuple) {
  const Part part = parts_of({tuple}).front();
  std::vector<const std::byte*> addresses;
  std::vector<std::uint32_t> lengths;
  const std::uint64_t bytes = row_bytes(static_cast<RowFormat>(format), dim);
  for (std::uint64_t b = 0; b < part.bags; ++b) lengths.push_back(static_cast<std::uint32_t>(part.length(b)));
  for (std::int64_t i = part.offsets[0]; i < part.offsets[part.bags]; ++i) {
    addresses.push_back(reinterpret_cast<const std::byte*>(rows) + static_cast<std::uint64_t>(part.indices[i]) * bytes);
  }
  Pool job;
  job.format = static_cast<RowFormat>(format);
  job.dim = dim;
  job.mean = part.mean;
  job.rows = addresses.data();
  job.weights = part.weights ? part.weights + part.first() : nullptr;
  job.lengths = lengths.data();
  job.bags = part.bags;
  job.out = part.out;
  job.stride = part.stride;
  pool_with(instructions.c_str(), job);
}

using TableTuple = std::tuple<std::uint32_t, std::uint32_t, std::uint32_t, std::uint64_t, std::uint64_t, std::uintptr_t>;

std::vector<Table> tables_of(const std::vector<TableTuple>& tuples) {
  std::vector<Table> tables;
  for (const auto& [owner, dim, format, rows, offset, data] : tuples) {
    const auto kind = static_cast<RowFormat>(format);
    tables.push_back({owner, dim, kind, rows, row_bytes(kind, dim), offset, reinterpret_cast<const std::byte*>(data)});
  }
  return tables;
}

// All requests that bags are cut into, each with the bytes of its response: for tests.
std::vector<std::pair<nb::bytes, std::uint64_t>> queries_of(const std::vector<TableTuple>& tables,
                                                            const std::vector<PartTuple>& tuples, std::uint64_t room,
                                                            std::uint64_t reply_room) {
  const std::vector<Table> all = tables_of(tables);
  const std::vector<Part> parts = parts_of(tuples);
  std::vector<const Part*> pointers;
  for (const Part& part : parts) pointers.push_back(&part);
  Cursor cursor;
  std::vector<Landing> landings;
  std::vector<std::byte> request(room);
  std::vector<std::pair<nb::bytes, std::uint64_t>> queries;
  while (cursor.part < parts.size()) {
    const std::uint64_t bytes = write_query(pointers, all, cursor, request.data(), room, reply_room, landings);
    std::uint64_t reply = 0;
    for (const Landing& each : landings) reply += 4 * each.bags * each.dim;
    queries.emplace_back(nb::bytes(request.data(), bytes), reply);
  }
  return queries;
}

// What rank `self` answers to requests of one client, one after another: (kind of fault, rows as bytes) of each. Both
// lie in blocks of just their size, so that a sanitizer sees whoever leaves them. `gpu`: its tables are there.
std::vector<std::pair<std::uint32_t, nb::bytes>> answers_to(const std::vector<TableTuple>& tables, std::uint32_t self,
                                                            const std::vector<nb::bytes>& requests, std::uint64_t room,
                                                          GpuPooler* gpu) {
  std::vector<Table> all = tables_of(tables);
  Carry carry;
  Scratch scratch;
  scratch.gpu = gpu;
  for (Table& each : all) each.on_gpu = gpu != nullptr;
  std::vector<std::pair<std::uint32_t, nb::bytes>> answers;
  for (const nb::bytes& each : requests) {
    const std::unique_ptr<std::byte[]> request(new std::byte[each.size()]), reply(new std::byte[room]());
    std::memcpy(request.get(), each.c_str(), each.size());
    const Answer answer = answer_query(request.get(), each.size(), all, self, carry, reply.get(), room, scratch);
    answers.emplace_back(answer.fault.kind, nb::bytes(reply.get(), answer.bytes));
  }
  return answers;
}

}  // namespace

void bind_lookup(nb::module_& m) {
  m.def("pool_with", &pool_with_instructions, "instructions"_a, "format_"_a, "dim"_a, "rows"_a, "part"_a);
  m.def("queries_of", &queries_of, "tables"_a, "parts"_a, "room"_a, "reply_room"_a);
  m.def("answers_to", &answers_to, "tables"_a, "rank"_a, "requests"_a, "room"_a,
        "gpu"_a = nb::none());
  m.def("pool_instructions", [] { return std::string(pool_instructions()); });
  m.attr("QUERY_HEAD_BYTES") = sizeof(QueryHead);
  m.attr("PART_HEAD_BYTES") = sizeof(PartHead);

  nb::class_<Lookup>(m, "Lookup")
      .def("__init__",
           [](Lookup* self, std::shared_ptr<Fabric> fabric, std::shared_ptr<Arena> requests, std::shared_ptr<Arena> responses,
              std::shared_ptr<Arena> table_memory, const std::vector<TableTuple>& tables,
              const std::pair<Geometry, Geometry>& geometry, std::uint32_t rank, std::uint32_t lag, std::uint64_t epoch,
              std::pair<std::uint64_t, bool> version, bool direct, bool checksums, bool read, const std::tuple<bool, bool, std::uint64_t>& fetch, bool serve_inline, bool degrade,
              float instead, double share,
              std::int64_t keepalive_ns, const std::pair<std::uint32_t, std::uint32_t>& wait,
              const std::pair<std::uint32_t, std::uint32_t>& serving) {
             Lookup::Config config;
             config.requests = geometry.first;
             config.responses = geometry.second;
             config.rank = rank;
             config.lag = lag;
             config.epoch = epoch;
             std::tie(config.version, config.second_place) = version;
             config.allow_direct = direct;
             config.checksums = checksums;
             config.read = read;
             std::tie(config.fetch, config.dedupe, config.cache_bytes) = fetch;
             config.serve_inline = serve_inline;
             config.degrade = degrade;
             config.instead = instead;
             config.share = share;
             config.keepalive_ns = keepalive_ns < 0 ? kNever : static_cast<std::uint64_t>(keepalive_ns);
             config.wait = {wait.first, wait.second};
             config.serving = {serving.first, serving.second};
             config.interrupted = interrupted;
             new (self) Lookup(std::move(fabric), std::move(requests), std::move(responses), std::move(table_memory),
                               tables_of(tables), config);
           },
           "fabric"_a, "requests"_a, "responses"_a, "table_memory"_a.none(), "tables"_a, "geometry"_a, "rank"_a, "lag"_a, "epoch"_a, "version"_a, "direct"_a,
           "checksums"_a, "read"_a, "fetch"_a, "serve_inline"_a, "degrade"_a, "instead"_a, "share"_a, "keepalive_ns"_a, "wait"_a,
           "serving"_a)
      .def("use", &Lookup::use, "serving"_a, "own"_a, "tables"_a)
      .def("connect",
           [](Lookup& self,
              const std::vector<std::tuple<std::uint32_t, nb::bytes,
                                           std::vector<std::tuple<nb::bytes, std::uint64_t, nb::bytes>>, pid_t>>& peers,
              std::vector<int> pidfds, std::int64_t timeout_ns) {
             const auto text = [](const nb::bytes& bytes) { return std::string(bytes.c_str(), bytes.size()); };
             std::vector<Lookup::Peer> all;
             for (const auto& [rank, worker, arenas, pid] : peers) {
               PeerAddress planes[3];
               for (std::size_t i = 0; i < 3 && i < arenas.size(); ++i) {
                 const auto& [rkey, address, token] = arenas[i];
                 planes[i] = {rank, text(worker), text(rkey), address, text(token), pid};
               }
               all.push_back({planes[0], planes[1], planes[2]});
             }
             const nb::gil_scoped_release release;
             self.connect(all, std::move(pidfds), deadline(timeout_ns));
           },
           "peers"_a, "pidfds"_a, "timeout_ns"_a)
      .def("ask",
           [](Lookup& self, const std::vector<PartTuple>& parts, std::int64_t timeout_ns) {
             std::uint64_t number = 0;
             const std::vector<Part> all = parts_of(parts);
             const int outcome = without_gil([&] { return self.ask(all, deadline(timeout_ns), number); });
             return std::pair(outcome, number);
           },
           "parts"_a, "timeout_ns"_a)
      .def("ask_into",
           [](Lookup& self, nb::sequence bags, nb::handle out, nb::dict numbers, bool mean, std::int64_t timeout_ns) {
             std::uint64_t number = 0;
             std::vector<Part> parts;
             if (!plain_parts(self, bags, out, numbers, mean, parts)) return std::pair(-1, number);
             const int outcome = without_gil([&] { return self.ask(parts, deadline(timeout_ns), number); });
             return std::pair(outcome, number);
           },
           "bags"_a, "out"_a, "numbers"_a, "mean"_a, "timeout_ns"_a,
           "As ask(), of Bags and of one array for all; an outcome of -1: not a plain case, nothing has been done.")
      .def("wait",
           [](Lookup& self, std::uint64_t number, std::int64_t timeout_ns) {
             return without_gil([&] { return self.wait(number, deadline(timeout_ns)); });
           },
           "number"_a, "timeout_ns"_a)
      .def("ready",
           [](Lookup& self, std::uint64_t number) {
             const nb::gil_scoped_release release;
             return self.ready(number);
           },
           "number"_a)
      .def("forget", &Lookup::forget, "number"_a)
      .def("missing", &Lookup::missing, "number"_a)
      .def("keep",
           [](Lookup& self, std::uint32_t table, std::uintptr_t rows, std::uint64_t count, std::int64_t timeout_ns) {
             return without_gil(
                 [&] { return self.keep(table, reinterpret_cast<const std::int64_t*>(rows), count, deadline(timeout_ns)); });
           },
           "table"_a, "rows"_a, "count"_a, "timeout_ns"_a)
      .def("finish",
           [](Lookup& self, std::int64_t timeout_ns) {
             return without_gil([&] { return self.finish(deadline(timeout_ns)); });
           },
           "timeout_ns"_a)
      .def("prefer",
           [](Lookup& self, std::uint32_t table, const std::tuple<double, double, double, double>& costs) {
             const auto& [read_bag, read_row, ask_bag, ask_row] = costs;
             self.prefer(table, {read_bag, read_row, ask_bag, ask_row});
           },
           "table"_a, "costs"_a)
      .def("forget_stats", &Lookup::forget_stats)
      .def("make_room",
           [](Lookup& self, std::uint64_t version, std::int64_t timeout_ns) {
             std::uint32_t place = 0;
             const int outcome = without_gil([&] { return self.make_room(version, deadline(timeout_ns), place); });
             return std::pair(outcome, place);
           },
           "version"_a, "timeout_ns"_a)
      .def("load",
           [](Lookup& self, std::uint64_t version, std::uint32_t place, const std::vector<std::uintptr_t>& rows) {
             std::vector<const std::byte*> addresses;
             for (const std::uintptr_t each : rows) addresses.push_back(reinterpret_cast<const std::byte*>(each));
             return self.load(version, place, addresses);
           },
           "version"_a, "place"_a, "rows"_a)
      .def("behind", &Lookup::behind)
      .def("retire_version", &Lookup::retire_version)
      .def_prop_ro("version", &Lookup::version)
      .def_prop_ro("loaded", &Lookup::loaded)
      .def_prop_ro("next", &Lookup::next)
      .def("details",
           [](const Lookup& self) {
             const Details& it = self.details();
             return std::tuple(it.rank, it.iteration, it.a,
                               nb::steal<nb::str>(PyUnicode_DecodeUTF8(it.text.data(), Py_ssize_t(it.text.size()), "replace")));
           })
      .def("fault",
           [](const Lookup& self) {
             const Fault& it = self.fault();
             return std::tuple(static_cast<std::uint32_t>(it.kind), it.table_number, it.position, it.value, it.limit);
           })
      .def("stats",
           [](const Lookup& self, std::uint32_t owner) {
             const AskStats& it = self.stats(owner);
             return std::tuple(it.requests, it.request_bytes, it.response_bytes, it.bags, it.rows, it.wait_ns, it.degraded,
                               it.fetched, it.pinned, it.cached, it.repeated, it.read);
           },
           "owner"_a)
      .def("served",
           [](const Lookup& self, std::uint32_t client) {
             const ServeStats& it = self.served(client);
             return std::tuple(it.requests.load(), it.bags.load(), it.rows.load(), it.refused.load(), it.busy_ns.load());
           },
           "client"_a)
      .def("direct", &Lookup::direct, "peer"_a)
      .def("mapped", &Lookup::mapped, "owner"_a)
      .def("gets", nb::overload_cast<std::uint32_t>(&Lookup::gets, nb::const_), "owner"_a)
      .def("readable", &Lookup::readable, "owner"_a)
      .def("transport", &Lookup::transport, "peer"_a, nb::call_guard<nb::gil_scoped_release>())
      .def("silence_ns", &Lookup::silence_ns, "peer"_a)
      .def("close",
           [](Lookup& self, std::uint32_t code, std::uint32_t blamed, const std::string& text, std::int64_t timeout_ns) {
             const nb::gil_scoped_release release;
             return self.close(code, blamed, text, deadline(timeout_ns));
           },
           "code"_a, "blamed"_a, "text"_a, "timeout_ns"_a);
}

}  // namespace blsrdma
