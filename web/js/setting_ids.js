/** Ids of the settings that more than the dialog looks at. */

export const AUTO_PARK = "qmove.autoPark";
export const NOTIFICATIONS = "qmove.notifications";
/** Whether the chip is in the top bar. The backend does not know it. */
export const CHIP = "qmove.chip";
