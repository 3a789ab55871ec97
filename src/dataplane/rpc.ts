import { RpcClient, type RpcHandlers, RpcServer } from '../common/rpc.js';
import { type DataplaneEvent, type DataplaneMethods, LINE_LIMIT_BYTES } from './protocol.js';

export type Handlers = RpcHandlers<DataplaneMethods>;
export type DataplaneClient = RpcClient<DataplaneMethods, DataplaneEvent>;
export type DataplaneServer = RpcServer<DataplaneMethods, DataplaneEvent>;

/**
 * Both ends are this project's own and the socket is private to root: the types of DataplaneMethods
 * hold by construction, native code checks ranges again.
 */
export function listenForSfld(path: string, handlers: Handlers): Promise<DataplaneServer> {
  return RpcServer.listen(path, handlers, {
    name: 'data plane',
    lineLimitBytes: LINE_LIMIT_BYTES,
  });
}

/** Errors: E_DATAPLANE if nothing listens there. */
export function connectToDataplane(path: string): Promise<DataplaneClient> {
  return RpcClient.connect(path, {
    name: 'the data plane',
    lineLimitBytes: LINE_LIMIT_BYTES,
    lost: 'E_DATAPLANE',
  });
}
