import { describe, expect, test } from "vitest";
import { bytes, duration, gib, percent, speed } from "../../web/js/format.js";

describe("sizes", () => {
  test.each([
    [0, "0 B"],
    [-5, "0 B"],
    [1023, "1023 B"],
    [1024, "1.0 KiB"],
    [1.5 * 2 ** 30, "1.5 GiB"],
    [99.96 * 2 ** 20, "100 MiB"],
    [2 ** 30 - 1, "1.0 GiB"],
    [3 * 2 ** 50, "3072 TiB"],
  ])("%d bytes are %s", (nbytes, text) => expect(bytes(nbytes)).toBe(text));
});

test.each([
  [0, "0.0 s"],
  [9.94, "9.9 s"],
  [9.96, "10 s"],
  [59.6, "1 min 0 s"],
  [125, "2 min 5 s"],
])("%d seconds are %s", (seconds, text) => expect(duration(seconds)).toBe(text));

test.each([
  [25.2 * 2 ** 30, "25.2 GiB/s"],
  [5 * 2 ** 20, "5.0 MiB/s"],
])("%d bytes in a second are %s", (rate, text) => expect(speed(rate)).toBe(text));

test.each([
  [18.24, "18.2"],
  [23.98, "24"],
  [0.53, "0.5"],
  [0, "0.0"],
  [141.2, "141"],
])("%d GiB are %s", (size, text) => expect(gib(size * 2 ** 30)).toBe(text));

test.each([
  [0.426, "43%"],
  [1.2, "100%"],
  [-1, "0%"],
])("a share of %d is %s", (share, text) => expect(percent(share)).toBe(text));
