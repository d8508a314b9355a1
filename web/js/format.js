/** Numbers as people read them. Sizes are in powers of 1024, as GPUs are sold, and so are speeds. */

const UNITS = ["B", "KiB", "MiB", "GiB", "TiB"];
const GIB = 2 ** 30;

/**
 * @param {number} nbytes
 * @returns {string} "1.5 GiB"
 */
export function bytes(nbytes) {
  let value = Math.max(0, nbytes);
  let unit = 0;
  while (value >= 1023.95 && unit < UNITS.length - 1) {
    value /= 1024;
    unit += 1;
  }
  const digits = unit === 0 || value >= 99.95 ? 0 : 1;
  return `${value.toFixed(digits)} ${UNITS[unit]}`;
}

/**
 * @param {number} nbytes
 * @returns {string} GiB without the unit: "18.2", and "24" for what is as good as whole
 */
export function gib(nbytes) {
  const value = Math.max(0, nbytes) / GIB;
  const whole = Math.round(value);
  return whole > 0 && Math.abs(value - whole) < 0.05 ? String(whole) : value.toFixed(value < 99.95 ? 1 : 0);
}

/**
 * @param {number} bytesPerSecond
 * @returns {string} "12.3 GiB/s"
 */
export const speed = (bytesPerSecond) => `${bytes(bytesPerSecond)}/s`;

/**
 * @param {number} seconds
 * @returns {string} "0.4 s", "12 s", "2 min 5 s"
 */
export function duration(seconds) {
  if (seconds < 9.95) return `${Math.max(0, seconds).toFixed(1)} s`;
  const whole = Math.round(seconds);
  return whole < 60 ? `${whole} s` : `${Math.floor(whole / 60)} min ${whole % 60} s`;
}

/**
 * @param {number} share from 0 to 1
 * @returns {string} "42%"
 */
export function percent(share) {
  return `${Math.round(100 * Math.min(1, Math.max(0, share)))}%`;
}
