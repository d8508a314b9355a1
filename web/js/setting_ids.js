/** Ids of the settings that more than the dialog looks at. */

export const AUTO_PARK = "qmove.autoPark";
export const NOTIFICATIONS = "qmove.notifications";
