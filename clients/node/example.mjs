// How to hold a slot of a limiter from Node.js, with ioredis. README.md shows the function below.

import { randomUUID } from "node:crypto";

// Runs `work` with one of `limit` slots; waits in line for it, at most `wait` seconds (0: no limit).
// The signal that `work` gets is aborted when the lease is lost: then it must stop.
export async function withSlot(redis, prefix, { limit, ttl, wait }, work) {
  const key = randomUUID();
  // While it waits a connection does nothing else: not one that others use, and no second wait
  // that nobody asked for if it breaks.
  const own = redis.duplicate({ retryStrategy: null, commandTimeout: undefined });
  const waiting = own.call("LIMITER.BACQUIRE", prefix, key, limit, ttl, wait);
  if (!(await waiting.finally(() => own.disconnect()))) throw new Error(`no slot in ${prefix}`);

  const lost = new AbortController();
  let until = performance.now() + ttl * 1000;
  const renewal = setInterval(async () => {
    const sent = performance.now();
    const renewed = await redis.call("LIMITER.RENEW", prefix, key, ttl).catch(() => undefined);
    if (renewed === 1) until = sent + ttl * 1000;
    else if (renewed === 0 || performance.now() > until) lost.abort();
  }, (ttl * 1000) / 3);
  try {
    return await work(lost.signal);
  } finally {
    clearInterval(renewal);
    await redis.call("LIMITER.RELEASE", prefix, key);
  }
}
