#include <string.h>

#include "agent.h"

struct line line_split(char *text) {
  struct line line = {.verb = text, .id = "", .rest = text + strlen(text)};
  char *space = strchr(text, ' ');
  if (!space) return line;
  *space = '\0';
  line.rest = space + 1;
  size_t word = strcspn(line.rest, " ");
  if (word == 0 || word > 32 || memchr(line.rest, '=', word)) return line;
  line.id = line.rest;
  if (line.rest[word]) {
    line.rest[word] = '\0';
    line.rest += word + 1;
  } else {
    line.rest += word;
  }
  return line;
}

const char *line_raw(const char *rest, const char *key, size_t *len) {
  size_t key_len = strlen(key);
  for (const char *at = rest; *at;) {
    size_t word = strcspn(at, " ");
    if (word > key_len && at[key_len] == '=' && !memcmp(at, key, key_len)) {
      *len = word - key_len - 1;
      return at + key_len + 1;
    }
    at += word;
    while (*at == ' ') at++;
  }
  return NULL;
}

static int hex_digit(char c) {
  if (c >= '0' && c <= '9') return c - '0';
  c |= 0x20;
  return c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

bool line_get(const char *rest, const char *key, char *out, size_t out_bytes) {
  size_t len, used = 0;
  const char *at = line_raw(rest, key, &len);
  if (!at) return false;
  for (const char *end = at + len; at < end; at++) {
    char c = *at;
    if (c == '%') {
      if (end - at < 3) return false;
      int high = hex_digit(at[1]), low = hex_digit(at[2]);
      if (high < 0 || low < 0 || (high == 0 && low == 0)) return false;
      c = (char)(high << 4 | low);
      at += 2;
    }
    if (used + 1 >= out_bytes) return false;
    out[used++] = c;
  }
  out[used] = '\0';
  return true;
}

bool parse_u64(const char *text, size_t len, uint64_t *out) {
  uint64_t value = 0;
  if (len == 0) return false;
  for (size_t i = 0; i < len; i++) {
    if (text[i] < '0' || text[i] > '9') return false;
    if (__builtin_mul_overflow(value, 10, &value)) return false;
    if (__builtin_add_overflow(value, (uint64_t)(text[i] - '0'), &value)) return false;
  }
  *out = value;
  return true;
}

bool line_u64(const char *rest, const char *key, uint64_t *out) {
  size_t len;
  const char *raw = line_raw(rest, key, &len);
  return raw && parse_u64(raw, len, out);
}

char *put_text(char *at, char *end, const char *text) {
  size_t len = strlen(text);
  if (!at || (size_t)(end - at) < len) return NULL;
  memcpy(at, text, len);
  return at + len;
}

char *put_u64(char *at, char *end, uint64_t value) {
  char digits[21];
  unsigned first = sizeof digits - 1;
  digits[first] = '\0';
  do digits[--first] = (char)('0' + value % 10);
  while (value /= 10);
  return put_text(at, end, digits + first);
}

char *put_escaped(char *at, char *end, const char *text) {
  static const char hex[] = "0123456789ABCDEF";
  for (; at && *text; text++) {
    unsigned char c = (unsigned char)*text;
    bool plain = c > ' ' && c < 0x7f && c != '%';
    if (end - at < (plain ? 1 : 3)) return NULL;
    if (plain) {
      *at++ = (char)c;
    } else {
      *at++ = '%';
      *at++ = hex[c >> 4];
      *at++ = hex[c & 15];
    }
  }
  return at;
}

static const char alphabet[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

size_t base64_encode(char *out, const uint8_t *data, size_t len) {
  char *at = out;
  for (size_t i = 0; i < len; i += 3) {
    uint32_t word = (uint32_t)data[i] << 16;
    if (i + 1 < len) word |= (uint32_t)data[i + 1] << 8;
    if (i + 2 < len) word |= data[i + 2];
    *at++ = alphabet[word >> 18];
    *at++ = alphabet[word >> 12 & 63];
    *at++ = i + 1 < len ? alphabet[word >> 6 & 63] : '=';
    *at++ = i + 2 < len ? alphabet[word & 63] : '=';
  }
  return (size_t)(at - out);
}

static int base64_digit(char c) {
  if (c >= 'A' && c <= 'Z') return c - 'A';
  if (c >= 'a' && c <= 'z') return c - 'a' + 26;
  if (c >= '0' && c <= '9') return c - '0' + 52;
  return c == '+' ? 62 : c == '/' ? 63 : -1;
}

ssize_t base64_decode(uint8_t *out, size_t out_bytes, const char *text, size_t len) {
  if (len % 4) return -1;
  size_t pad = len && text[len - 1] == '=' ? (text[len - 2] == '=' ? 2 : 1) : 0;
  size_t bytes = len / 4 * 3 - pad;
  if (bytes > out_bytes) return -1;
  for (size_t i = 0, at = 0; i < len; i += 4) {
    uint32_t word = 0;
    for (size_t j = 0; j < 4; j++) {
      int digit = i + j >= len - pad ? 0 : base64_digit(text[i + j]);
      if (digit < 0) return -1;
      word = word << 6 | (uint32_t)digit;
    }
    for (int shift = 16; shift >= 0 && at < bytes; shift -= 8) out[at++] = (uint8_t)(word >> shift);
  }
  return (ssize_t)bytes;
}
