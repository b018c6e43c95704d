// The example, run against a real server: $REDIS_SERVER with the module $LIMITER_MODULE.
// Nothing waits for a time to pass, only for a condition, with a deadline.

import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { mkdtemp, readFile, rm } from "node:fs/promises";
import { createServer } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, before, test } from "node:test";
import { setTimeout as sleep } from "node:timers/promises";

import Redis from "ioredis";

import { withSlot } from "./example.mjs";

const DEADLINE = 20_000;
const { REDIS_SERVER, LIMITER_MODULE } = process.env;

let server, folder, redis, admin;

async function until(what, condition) {
  const giveUp = Date.now() + DEADLINE;
  while (!(await condition())) {
    assert.ok(Date.now() < giveUp, `waited in vain until ${what}`);
    await sleep(2); // Between two looks, not instead of them.
  }
}

function freePort() {
  return new Promise((resolve) => {
    const listener = createServer().listen(0, "127.0.0.1", () => {
      const { port } = listener.address();
      listener.close(() => resolve(port));
    });
  });
}

async function waiters() {
  const clients = await admin.client("LIST");
  return clients.split("\n").filter((line) => / flags=b .* cmd=limiter.bacquire/.test(line));
}

before(async () => {
  assert.ok(REDIS_SERVER && LIMITER_MODULE, "scripts/test-clients sets both");
  folder = await mkdtemp(join(tmpdir(), "limiter-"));
  // Another process may take the port between our look and the server's: try again then.
  for (let tries = 0; tries < 20 && admin?.status !== "ready"; tries++) {
    admin?.disconnect();
    const port = await freePort();
    const args = ["--port", port, "--save", "", "--dir", folder, "--loadmodule", LIMITER_MODULE];
    server = spawn(REDIS_SERVER, args, { stdio: "ignore" });
    admin = new Redis(port, { retryStrategy: () => 20, maxRetriesPerRequest: null });
    admin.on("error", () => {}); // Until the server is up it refuses connections.
    await until("it is up or has ended", () => admin.status === "ready" || server.exitCode !== null);
  }
  redis = new Redis(admin.options.port);
});

after(async () => {
  redis.disconnect();
  admin.disconnect();
  server.kill("SIGKILL");
  await rm(folder, { recursive: true, force: true });
});

test("the README shows the example", async () => {
  const example = await readFile(new URL("example.mjs", import.meta.url), "utf8");
  const readme = await readFile(new URL("../../README.md", import.meta.url), "utf8");
  const shown = example.slice(example.indexOf("// Runs"));
  assert.ok(shown.startsWith("// Runs") && readme.includes("```js\n" + shown + "```\n"));
});

test("never more than the limit, and everybody's turn comes", async () => {
  let inside = 0;
  let most = 0;
  const work = async () => {
    most = Math.max(most, ++inside);
    await redis.ping();
    inside--;
    return "done";
  };
  const rules = { limit: 2, ttl: 30, wait: 20 };
  const all = Array.from({ length: 20 }, () => withSlot(redis, "p", rules, work));
  assert.deepEqual(new Set(await Promise.all(all)), new Set(["done"]));
  assert.ok(most <= 2, `${most} at once`);
  assert.equal(await admin.exists("p"), 0);
});

test("a wait does not hold up the others on the connection", async () => {
  await redis.call("LIMITER.ACQUIRE", "q", "holder", 1, 60);
  const waiter = withSlot(redis, "q", { limit: 1, ttl: 30, wait: 0 }, async () => "in");
  await until("it waits", async () => (await waiters()).length === 1);
  // If it waited on this connection, these would wait behind it without end.
  assert.equal(await redis.ping(), "PONG");
  assert.equal(await redis.call("LIMITER.RELEASE", "q", "holder"), 1);
  assert.equal(await waiter, "in");
});

test("no slot in time is an error, and nobody is left in line", async () => {
  await redis.call("LIMITER.ACQUIRE", "r", "holder", 1, 60);
  const late = withSlot(redis, "r", { limit: 1, ttl: 30, wait: 0.05 }, assert.fail);
  await assert.rejects(late, /no slot in r/);
  const broken = withSlot(redis, "r", { limit: 1, ttl: 30, wait: 0 }, assert.fail);
  const refused = assert.rejects(broken, /closed/);
  await until("it waits", async () => (await waiters()).length === 1);
  const [, id] = /id=(\d+)/.exec((await waiters())[0]);
  await admin.client("KILL", "ID", id);
  await refused;
  assert.equal((await waiters()).length, 0);
  assert.deepEqual(await admin.zrange("r", 0, -1), ["holder"]);
});

test("a lease outlives its ttl, and its loss is told", async () => {
  const rules = { limit: 1, ttl: 1, wait: 20 };
  await withSlot(redis, "s", rules, async (lost) => {
    const end = Number((await admin.zrange("s", 0, -1, "WITHSCORES"))[1]);
    const renewed = async () => Number((await admin.zrange("s", 0, -1, "WITHSCORES"))[1]) > end + 1;
    await until("it has outlived its first lease", renewed);
    assert.equal(lost.aborted, false);
    await admin.del("s");
    await until("it hears of it", () => lost.aborted);
  });
  await assert.rejects(withSlot(redis, "s", rules, () => Promise.reject(new Error("mine"))), /mine/);
  assert.equal(await admin.exists("s"), 0);
});
