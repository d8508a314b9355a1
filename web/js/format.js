/** Numbers as people read them. Sizes are in powers of 1024, as GPUs are sold. */

const UNITS = ["B", "KiB", "MiB", "GiB", "TiB"];

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
 * @param {number} bytesPerSecond
 * @returns {string} "12.3 GB/s": link speeds are given in powers of 1000
 */
export function speed(bytesPerSecond) {
  return `${(bytesPerSecond / 1e9).toFixed(bytesPerSecond < 1e8 ? 3 : 1)} GB/s`;
}

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
