// PTX, the text that nvcc makes of a .cu file, parsed: kernels as lists of instructions. What the kernels of csrc/cuda
// do not use is not known, and an error.
#pragma once

#include <algorithm>
#include <cctype>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <map>
#include <set>
#include <sstream>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace ptx {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

[[noreturn]] __attribute__((format(printf, 1, 2))) inline void fail(const char* format, ...) {
  char text[2048];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof(text), format, arguments);
  va_end(arguments);
  throw Error(text);
}

enum class Kind : uint8_t { None, Pred, Bits, Unsigned, Signed, Float, BFloat };
struct Type {
  Kind kind = Kind::None;
  uint8_t bytes = 0;
  bool is_float() const { return kind == Kind::Float || kind == Kind::BFloat; }
};

inline Type type_of(const std::string& name) {
  static const std::map<std::string, Type> types = {
      {"pred", {Kind::Pred, 1}},    {"b8", {Kind::Bits, 1}},      {"b16", {Kind::Bits, 2}},
      {"b32", {Kind::Bits, 4}},     {"b64", {Kind::Bits, 8}},     {"u8", {Kind::Unsigned, 1}},
      {"u16", {Kind::Unsigned, 2}}, {"u32", {Kind::Unsigned, 4}}, {"u64", {Kind::Unsigned, 8}},
      {"s8", {Kind::Signed, 1}},    {"s16", {Kind::Signed, 2}},   {"s32", {Kind::Signed, 4}},
      {"s64", {Kind::Signed, 8}},   {"f16", {Kind::Float, 2}},    {"f32", {Kind::Float, 4}},
      {"f64", {Kind::Float, 8}},    {"bf16", {Kind::BFloat, 2}}};
  const auto found = types.find(name);
  return found == types.end() ? Type{} : found->second;
}

// clang-format off
enum class Op : uint8_t {
  Mov, Pack, Unpack, Ld, St, Add, Sub, Mul, MulHi, MulWide, Mad, MadWide, Fma, Div, Rem, Neg, Abs, Min, Max, And, Or,
  Xor, Not, Shl, Shr, Setp, Selp, Cvt, Bra, Ret, Bar, BarWarp, Fence, Atom, Shfl, Vote, Prmt, Bfi, Bfe, Clz, Popc,
  Brev, Ex2, Rcp, Copysign, Assert
};
// clang-format on
enum class Cmp : uint8_t { Eq, Ne, Lt, Le, Gt, Ge, Equ, Neu, Ltu, Leu, Gtu, Geu, Num, Nan };
enum class Space : uint8_t { Global, Shared, Param };
enum class Rounding : uint8_t { Nearest, Zero, Down, Up, None };

// One cache line: to read them is what takes the time.
struct alignas(64) Inst {
  Op op;
  Type type;  // of the result
  Type from;  // of the operands, where that differs
  Cmp cmp = Cmp::Eq;
  Space space = Space::Global;
  Rounding rounding = Rounding::Nearest;
  uint8_t count = 1;  // of a vector
  bool ftz = false;
  bool negated = false;  // the guard
  char how = 0;          // which atom, shfl or vote: see instruction(). Of a fence: c for the block, g for all
  int32_t guard = -1;
  int32_t target = 0;  // of a jump; of an access to memory the offset from its address
  int32_t line = 0;
  int32_t d[4] = {};  // registers
  int32_t s[5] = {};  // registers, or constants: ~s is their number
};
static_assert(sizeof(Inst) == 64);

struct Function {
  std::string name;
  std::string text;
  int first_line = 0;
  std::vector<std::pair<int, int>> params;  // offset, size
  std::unordered_map<std::string, int> param_offsets;
  int param_bytes = 0;
  std::vector<Inst> code;
  std::vector<uint64_t> constants;
  std::vector<uint8_t> reg_bytes;
  std::vector<uint8_t> covered;  // by a launch so far, instruction by instruction
  int shared_bytes = 0;
};

// The special registers have the first numbers.
// clang-format off
enum SpecialRegister {
  TidX, TidY, TidZ, NTidX, NTidY, NTidZ, CtaX, CtaY, CtaZ, NCtaX, NCtaY, NCtaZ, LaneId, MaskEq, MaskLt, MaskLe,
  MaskGt, MaskGe, NumSpecial
};
// clang-format on

// The kernels of a PTX file.
class Program {
 public:
  explicit Program(const std::string& path) {
    std::ifstream file(path);
    if (!file) fail("cannot read %s", path.c_str());
    std::stringstream buffer;
    buffer << file.rdbuf();
    const std::string text = buffer.str();
    int line = 1;
    for (size_t at = 0; at < text.size(); ++line) {
      size_t end = std::min(text.find('\n', at), text.size());
      const std::string current = text.substr(at, end - at);
      const size_t entry = current.find(".entry ");
      if (entry != std::string::npos) {
        const size_t begin = entry + 7;
        const std::string name = current.substr(begin, current.find('(') - begin);
        end = text.find("\n}", at);
        if (end == std::string::npos) fail("no end of %s", name.c_str());
        Function& function = functions_[name];
        function.name = name;
        function.first_line = line;
        function.text = text.substr(at + begin + name.size(), end + 2 - at - begin - name.size());
        line += int(std::count(text.begin() + at, text.begin() + end, '\n'));
      } else if (current.rfind(".shared ", 0) == 0) {
        declare_shared(current, shared_of_file_);
      } else if (current.rfind(".global ", 0) == 0) {
        const size_t name = current.find_last_of(" ", current.find('[')) + 1;
        texts_.insert(current.substr(name, current.find('[') - name));
      }
      at = end + 1;
    }
    for (auto& [name, function] : functions_) parse(function);
  }

  Function& function(const std::string& name) {
    const auto found = functions_.find(name);
    if (found == functions_.end()) fail("no kernel %s in the PTX", name.c_str());
    return found->second;
  }
  const std::map<std::string, Function>& functions() const { return functions_; }

 private:
  struct SharedVariable {
    std::string name;
    int align = 1;
    int bytes = 0;
  };

  static void declare_shared(const std::string& text, std::vector<SharedVariable>& into) {
    std::istringstream words(text);
    std::string word;
    SharedVariable variable;
    int bytes = 1;
    while (words >> word) {
      if (word == ".align") {
        words >> variable.align;
      } else if (word[0] == '.' && word != ".shared") {
        bytes = type_of(word.substr(1)).bytes;
      } else if (word[0] != '.') {
        int count = 1;
        const size_t bracket = word.find('[');
        if (bracket != std::string::npos) count = std::stoi(word.substr(bracket + 1));
        variable.name = word.substr(0, word.find_first_of("[;"));
        variable.bytes = count * bytes;
      }
    }
    into.push_back(variable);
  }

  struct Token {
    std::string text;
    int line;
  };

  std::vector<Token> tokens_of(const Function& function) const {
    std::vector<Token> tokens;
    const std::string& text = function.text;
    int line = function.first_line;
    const auto is_word = [](char c) {
      return std::isalnum((unsigned char)c) || c == '_' || c == '$' || c == '%' || c == '.';
    };
    for (size_t i = 0; i < text.size();) {
      const char c = text[i];
      if (c == '\n') ++line;
      if (std::isspace((unsigned char)c)) {
        ++i;
      } else if (c == '/' && text[i + 1] == '/') {
        while (i < text.size() && text[i] != '\n') ++i;
      } else if (c == '"') {
        const size_t end = text.find('"', i + 1);
        tokens.push_back({text.substr(i, end + 1 - i), line});
        i = end + 1;
      } else if (is_word(c) || (c == '-' && std::isdigit((unsigned char)text[i + 1]))) {
        size_t end = i + 1;
        while (end < text.size() && (is_word(text[end]) || (text[end] == ':' && text[end + 1] == ':'))) {
          end += text[end] == ':' ? 2 : 1;
        }
        tokens.push_back({text.substr(i, end - i), line});
        i = end;
      } else {
        tokens.push_back({std::string(1, c), line});
        ++i;
      }
    }
    return tokens;
  }

  void parse(Function& function) {
    tokens_ = tokens_of(function);
    at_ = 0;
    f_ = &function;
    scopes_.assign(1, {});
    labels_.clear();
    std::vector<std::pair<int, std::string>> jumps;
    shared_.clear();
    int shared_end = 0;
    const auto place_shared = [&](const std::vector<SharedVariable>& variables) {
      for (const SharedVariable& variable : variables) {
        shared_end = (shared_end + variable.align - 1) / variable.align * variable.align;
        shared_[variable.name] = shared_end;
        shared_end += variable.bytes;
      }
    };
    place_shared(shared_of_file_);

    static const char* const special[NumSpecial] = {
        "%tid.x",   "%tid.y",       "%tid.z",       "%ntid.x",      "%ntid.y",      "%ntid.z",
        "%ctaid.x", "%ctaid.y",     "%ctaid.z",     "%nctaid.x",    "%nctaid.y",    "%nctaid.z",
        "%laneid",  "%lanemask_eq", "%lanemask_lt", "%lanemask_le", "%lanemask_gt", "%lanemask_ge"};
    for (const char* name : special) add_register(name, 4);

    expect("(");
    while (peek() != ")") {
      expect(".param");
      int align = 0, bytes = 0;
      std::string name;
      while (peek() != "," && peek() != ")") {
        const std::string word = next();
        if (word == ".ptr") {  // what follows is of the memory behind the pointer
          while (peek()[0] == '.') {
            if (next() == ".align") next();
          }
        } else if (word == ".align") {
          align = std::stoi(next());
        } else if (word[0] == '.') {
          bytes = type_of(word.substr(1)).bytes;
        } else if (word == "[") {
          bytes *= std::stoi(next());
          expect("]");
        } else {
          name = word;
        }
      }
      if (!align) align = bytes;
      const int offset = (function.param_bytes + align - 1) / align * align;
      function.params.push_back({offset, bytes});
      function.param_offsets[name] = offset;
      function.param_bytes = offset + bytes;
      if (peek() == ",") next();
    }
    expect(")");
    while (peek() != "{") next();  // .maxntid and the like
    next();

    int depth = 1;
    while (depth > 0) {
      const std::string word = next();
      if (word == "{") {
        ++depth;
        scopes_.push_back({});
      } else if (word == "}") {
        --depth;
        scopes_.pop_back();
      } else if (word == ";") {
      } else if (word == ".reg") {
        const int bytes = type_of(next().substr(1)).bytes;
        do {
          if (peek() == ",") next();
          const std::string name = next();
          if (peek() == "<") {
            next();
            const int count = std::stoi(next());
            expect(">");
            for (int i = 0; i < count; ++i) add_register(name + std::to_string(i), bytes);
          } else {
            add_register(name, bytes);
          }
        } while (peek() == ",");
        expect(";");
      } else if (word == ".shared") {
        std::string text = ".shared";
        while (peek() != ";") {
          if (peek() != "[" && peek() != "]" && text.back() != '[') text += ' ';
          text += next();
        }
        std::vector<SharedVariable> variables;
        declare_shared(text, variables);
        place_shared(variables);
      } else if (word == ".pragma" || word == ".param" || word == "st.param.b64" || word == "st.param.b32") {
        while (peek() != ";") next();  // the parameters are those of a failed assertion
      } else if (word[0] == '.') {
        fail("line %d: directive %s", tokens_[at_ - 1].line, word.c_str());
      } else if (peek() == ":") {
        next();
        labels_[word] = int(function.code.size());
      } else {
        Inst inst = instruction(word, jumps);
        function.code.push_back(inst);
      }
    }
    for (const auto& [index, label] : jumps) {
      if (!labels_.count(label)) fail("no label %s in %s", label.c_str(), function.name.c_str());
      function.code[index].target = labels_[label];
    }
    share_registers(function);
    function.shared_bytes = shared_end;
    function.covered.assign(function.code.size(), 0);
    function.text.clear();
  }

  // Calls `action` with each register that an instruction reads or writes.
  template <class Action>
  static void for_each_register(Inst& inst, Action&& action) {
    const auto call = [&](int32_t& reg, bool is_written) {
      if (reg >= NumSpecial) action(reg, is_written);
    };
    call(inst.guard, false);
    for (int32_t& reg : inst.s) call(reg, false);
    for (int32_t& reg : inst.d) call(reg, true);
  }

  // PTX has a register for each value. Those that are used only within one straight piece of code share a few, so that
  // the registers of a thread stay in the cache.
  static void share_registers(Function& function) {
    std::vector<Inst>& code = function.code;
    std::vector<int> piece(code.size() + 1, 0);
    for (size_t n = 0; n < code.size(); ++n) {
      if (code[n].op == Op::Bra) piece[size_t(code[n].target)] = 1;
      if (code[n].op == Op::Bra || code[n].op == Op::Ret) piece[n + 1] = 1;
    }
    for (size_t n = 1; n < piece.size(); ++n) piece[n] += piece[n - 1];

    struct Use {
      int first = -1;
      int last = -1;
      int shared = -1;  // the register instead
      bool is_local = false;
    };
    std::vector<Use> uses(function.reg_bytes.size());
    for (size_t n = 0; n < code.size(); ++n) {
      for_each_register(code[n], [&](int32_t reg, bool is_written) {
        Use& use = uses[size_t(reg)];
        if (use.first < 0) {
          use.first = int(n);
          use.is_local = is_written && code[n].guard < 0;
        }
        use.is_local = use.is_local && piece[size_t(use.first)] == piece[n];
        use.last = int(n);
      });
    }

    std::vector<uint8_t> bytes(function.reg_bytes.begin(), function.reg_bytes.begin() + NumSpecial);
    std::map<int, std::vector<int>> unused;  // by the size
    for (size_t n = 0; n < code.size(); ++n) {
      std::vector<std::pair<int, int>> done;
      for_each_register(code[n], [&](int32_t& reg, bool) {
        Use& use = uses[size_t(reg)];
        const int size = function.reg_bytes[size_t(reg)];
        std::vector<int>& free = unused[size];
        if (use.shared < 0 && use.is_local && !free.empty()) {
          use.shared = free.back();
          free.pop_back();
        } else if (use.shared < 0) {
          use.shared = int(bytes.size());
          bytes.push_back(uint8_t(size));
        }
        if (use.is_local && use.last == int(n)) {
          done.push_back({size, use.shared});
          use.is_local = false;  // once, where an instruction names it twice
        }
        reg = use.shared;
      });
      for (const auto& [size, reg] : done) unused[size].push_back(reg);
    }
    function.reg_bytes = bytes;
  }

  const std::string& peek() const { return tokens_.at(at_).text; }
  std::string next() { return tokens_.at(at_++).text; }
  void expect(const std::string& text) {
    const Token& token = tokens_.at(at_++);
    if (token.text != text) fail("line %d: %s where %s was expected", token.line, token.text.c_str(), text.c_str());
  }
  void add_register(const std::string& name, int bytes) {
    scopes_.back()[name] = int(f_->reg_bytes.size());
    f_->reg_bytes.push_back(uint8_t(bytes));
  }
  int find_register(const std::string& name) const {
    for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope) {
      const auto found = scope->find(name);
      if (found != scope->end()) return found->second;
    }
    return -1;
  }

  int32_t operand() {
    const Token token = tokens_.at(at_++);
    const std::string& word = token.text;
    const int32_t reg = find_register(word);
    if (reg >= 0) return reg;
    uint64_t value = 0;  // also of an assertion's text, which nobody reads
    if (word[0] == '0' && (word[1] == 'f' || word[1] == 'd')) {
      value = std::stoull(word.substr(2), nullptr, 16);
    } else if (std::isdigit((unsigned char)word[0])) {
      value = std::stoull(word, nullptr, 0);
    } else if (word[0] == '-') {
      value = uint64_t(std::stoll(word, nullptr, 0));
    } else if (shared_.count(word)) {
      value = uint64_t(shared_[word]);
    } else if (f_->param_offsets.count(word)) {
      value = uint64_t(f_->param_offsets[word]);
    } else if (!texts_.count(word)) {
      fail("line %d: unknown operand %s", token.line, word.c_str());
    }
    f_->constants.push_back(value);
    return ~int32_t(f_->constants.size() - 1);
  }
  // [address + offset]
  void address(Inst& inst) {
    expect("[");
    inst.s[0] = operand();
    for (; peek() != "]"; next()) {
      if (peek() != "+") inst.target += int32_t(std::stoll(peek(), nullptr, 0));
    }
    next();
  }
  // {a, b} or a; returns how many.
  int vector_of(int32_t (Program::*read)(), int32_t* into) {
    if (peek() != "{") {
      into[0] = (this->*read)();
      return 1;
    }
    next();
    int count = 0;
    do {
      into[count++] = (this->*read)();
    } while (next() != "}");
    return count;
  }
  int32_t result() {
    const int32_t reg = operand();
    if (reg < 0) fail("line %d: no register", tokens_[at_ - 1].line);
    return reg;
  }

  Inst instruction(std::string word, std::vector<std::pair<int, std::string>>& jumps) {
    Inst inst{};
    inst.line = tokens_[at_ - 1].line;
    if (word == "@") {
      if (peek() == "!") {
        inst.negated = true;
        next();
      }
      inst.guard = result();
      word = next();
    }
    std::vector<std::string> parts;
    for (size_t begin = 0; begin <= word.size();) {
      const size_t end = std::min(word.find('.', begin), word.size());
      parts.push_back(word.substr(begin, end - begin));
      begin = end + 1;
    }
    const std::string base = parts[0];
    std::vector<Type> types;
    bool wide = false, hi = false;
    std::string atom;
    for (size_t n = 1; n < parts.size(); ++n) {
      const std::string& part = parts[n];
      static const std::map<std::string, Cmp> cmps = {
          {"eq", Cmp::Eq},   {"ne", Cmp::Ne},   {"lt", Cmp::Lt},   {"le", Cmp::Le},   {"gt", Cmp::Gt},
          {"ge", Cmp::Ge},   {"lo", Cmp::Lt},   {"ls", Cmp::Le},   {"hi", Cmp::Gt},   {"hs", Cmp::Ge},
          {"equ", Cmp::Equ}, {"neu", Cmp::Neu}, {"ltu", Cmp::Ltu}, {"leu", Cmp::Leu}, {"gtu", Cmp::Gtu},
          {"geu", Cmp::Geu}, {"num", Cmp::Num}, {"nan", Cmp::Nan}};
      if (type_of(part).kind != Kind::None) {
        types.push_back(type_of(part));
      } else if (part == "global") {
        inst.space = Space::Global;
      } else if (part == "shared") {
        inst.space = Space::Shared;
      } else if (part == "param") {
        inst.space = Space::Param;
      } else if (part == "v2" || part == "v4") {
        inst.count = uint8_t(part[1] - '0');
      } else if (part == "ftz") {
        inst.ftz = true;
      } else if (part == "rz" || part == "rzi") {
        inst.rounding = Rounding::Zero;
      } else if (part == "rm" || part == "rmi") {
        inst.rounding = Rounding::Down;
      } else if (part == "rp" || part == "rpi") {
        inst.rounding = Rounding::Up;
      } else if (base == "setp" && cmps.count(part)) {
        inst.cmp = cmps.at(part);
      } else if (part == "wide") {
        wide = true;
      } else if (part == "hi") {
        hi = true;
      } else if (base == "atom" || base == "shfl" || base == "vote") {
        static const std::map<std::string, char> hows = {{"inc", 'i'}, {"add", 'a'},    {"exch", 'e'}, {"cas", 'c'},
                                                         {"max", 'm'}, {"up", 'u'},     {"down", 'd'}, {"bfly", 'x'},
                                                         {"idx", 'n'}, {"ballot", 'b'}, {"any", 'o'},  {"all", 'l'}};
        if (hows.count(part)) inst.how = hows.at(part);
      } else if (
          part != "rn" && part != "rni" && part != "lo" && part != "uni" && part != "sync" && part != "to" &&
          part != "approx" && part != "cg" && part != "ca" && part != "nc" && part != "gl" && part != "cta" &&
          part != "warp" && part != "sys" && part != "gpu" && part != "sc" && part != "acq_rel" && part != "relaxed" &&
          part != "acquire" && part != "release" && part != "volatile" && part != "aligned" && part != "barrier" &&
          part != "L1::evict_first") {
        fail("line %d: %s: modifier %s", inst.line, word.c_str(), part.c_str());
      }
    }
    if (!types.empty()) inst.type = inst.from = types[0];
    if (types.size() > 1) inst.from = types[1];

    static const std::map<std::string, std::pair<Op, int>> ops = {
        {"add", {Op::Add, 2}},           {"sub", {Op::Sub, 2}},   {"fma", {Op::Fma, 3}},
        {"div", {Op::Div, 2}},           {"rem", {Op::Rem, 2}},   {"neg", {Op::Neg, 1}},
        {"abs", {Op::Abs, 1}},           {"min", {Op::Min, 2}},   {"max", {Op::Max, 2}},
        {"and", {Op::And, 2}},           {"or", {Op::Or, 2}},     {"xor", {Op::Xor, 2}},
        {"not", {Op::Not, 1}},           {"shl", {Op::Shl, 2}},   {"shr", {Op::Shr, 2}},
        {"selp", {Op::Selp, 3}},         {"prmt", {Op::Prmt, 3}}, {"bfi", {Op::Bfi, 4}},
        {"bfe", {Op::Bfe, 3}},           {"clz", {Op::Clz, 1}},   {"popc", {Op::Popc, 1}},
        {"brev", {Op::Brev, 1}},         {"ex2", {Op::Ex2, 1}},   {"rcp", {Op::Rcp, 1}},
        {"copysign", {Op::Copysign, 2}}, {"cvt", {Op::Cvt, 1}},   {"setp", {Op::Setp, 2}},
        {"mul", {Op::Mul, 2}},           {"mad", {Op::Mad, 3}}};
    const auto simple = ops.find(base);
    if (simple != ops.end()) {
      inst.op = simple->second.first;
      if (wide) inst.op = base == "mul" ? Op::MulWide : Op::MadWide;
      if (hi) inst.op = Op::MulHi;
      inst.d[0] = result();
      for (int n = 0; n < simple->second.second; ++n) {
        expect(",");
        inst.s[n] = operand();
      }
    } else if (base == "mov" || base == "cvta") {
      const int to = vector_of(&Program::result, inst.d);
      expect(",");
      const int from = vector_of(&Program::operand, inst.s);
      inst.op = to > 1 ? Op::Unpack : from > 1 ? Op::Pack : Op::Mov;
      inst.count = uint8_t(std::max(to, from));
    } else if (base == "ld") {
      inst.op = Op::Ld;
      vector_of(&Program::result, inst.d);
      expect(",");
      address(inst);
    } else if (base == "st") {
      inst.op = Op::St;
      address(inst);
      expect(",");
      vector_of(&Program::operand, inst.s + 1);
    } else if (base == "bra") {
      inst.op = Op::Bra;
      jumps.push_back({int(f_->code.size()), next()});
    } else if (base == "ret" || base == "exit") {
      inst.op = Op::Ret;
    } else if (base == "call") {
      if (next() != "__assertfail") fail("line %d: a call", inst.line);
      while (peek() != ";") next();
      inst.op = Op::Assert;
    } else if ((base == "bar" && parts[1] == "warp")) {
      inst.op = Op::BarWarp;
      inst.s[0] = operand();
    } else if (base == "bar" || base == "barrier") {
      inst.op = Op::Bar;
      inst.s[0] = operand();
      if (peek() != ";") fail("line %d: a barrier of some threads", inst.line);
    } else if (base == "membar" || base == "fence") {
      inst.op = Op::Fence;
      inst.how = parts[1] == "cta" ? 'c' : 'g';
    } else if (base == "atom") {
      inst.op = Op::Atom;
      inst.d[0] = result();
      expect(",");
      address(inst);
      expect(",");
      inst.s[1] = operand();
      if (inst.how == 'c') {
        expect(",");
        inst.s[2] = operand();
      }
    } else if (base == "shfl") {
      inst.op = Op::Shfl;
      inst.d[0] = result();
      if (peek() == "|") {
        next();
        inst.d[1] = result();
        inst.count = 2;
      }
      for (int n = 0; n < 4; ++n) {
        expect(",");
        inst.s[n] = operand();
      }
    } else if (base == "vote") {
      inst.op = Op::Vote;
      inst.d[0] = result();
      for (int n = 0; n < 2; ++n) {
        expect(",");
        inst.s[n] = operand();
      }
    } else {
      fail("line %d: instruction %s", inst.line, word.c_str());
    }
    expect(";");
    return inst;
  }

  std::map<std::string, Function> functions_;
  std::vector<SharedVariable> shared_of_file_;
  std::set<std::string> texts_;  // of the file, by name
  std::vector<Token> tokens_;
  size_t at_ = 0;
  Function* f_ = nullptr;
  std::vector<std::unordered_map<std::string, int>> scopes_;
  std::unordered_map<std::string, int> labels_;
  std::unordered_map<std::string, int> shared_;
};

}  // namespace ptx
