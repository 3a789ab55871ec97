export {
  CLONES_MAX,
  type HostFree,
  type Placement,
  type PlacementPolicy,
  type Plan,
  planPlacement,
  slotsOf,
} from './placement.js';
export { type Free, type Limits, type Need, Resources, ResourcesSnapshot } from './resources.js';
export {
  type Ticket,
  TicketBook,
  type TicketBookOptions,
  TicketBookSnapshot,
  type TicketState,
} from './tickets.js';
