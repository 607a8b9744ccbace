// A small application, compiled by check_types against the declarations of client.js. Nothing
// runs it. Each @ts-expect-error is a mistake that the types have to find.
import { useEffect, useState, useSyncExternalStore } from "react";
import { SyncClient, indexedDBStorage, webStorage } from "./client.js";
import type { Change, Mutation, Refused, StateStorage, Status, Step } from "./client.js";

interface Todo {
  readonly id: string;
  readonly title: string;
  readonly completed: boolean;
}

type State = { readonly todos: readonly Todo[] };
type Data = { op: "put"; todo: Todo } | { op: "delete"; id: string };

interface Mutations {
  "todo.create": { id: string; title: string };
  "todo.update": { id: string } & Partial<Omit<Todo, "id">>;
  "todo.delete": { id: string };
}

function apply(state: State, { data, cursor, time }: Change<Data>): State {
  const moment: string = time + cursor.toFixed();
  if (data.op === "delete") return { todos: state.todos.filter(({ id }) => id !== data.id) };
  return moment ? { todos: [...state.todos, data.todo] } : state;
}

function predict(state: State, mutation: Mutation<Mutations>): State {
  switch (mutation.name) {
    case "todo.create":
      return { todos: [...state.todos, { ...mutation.args, completed: false }] };
    case "todo.update":
      // @ts-expect-error a title is a text
      mutation.args.title?.toFixed();
      return state;
    case "todo.delete":
      return { todos: state.todos.filter(({ id }) => id !== mutation.args.id) };
  }
}

// --- The client -----------------------------------------------------------------------------

const client = new SyncClient<State, Mutations, Data>({
  url: "/",
  scope: "demo",
  initial: { todos: [] },
  apply,
  predict,
  user: "ada",
  token: async () => (await fetch("/token")).text(),
  version: 2,
  migrate: (old: { list: Todo[] }, pending, oldVersion) => ({
    state: { todos: oldVersion === 1 ? old.list : [] },
    pending: pending.filter(({ name }) => name !== "todo.archive"),
  }),
});

const created = client.mutate("todo.create", { id: SyncClient.newId(), title: "Buy milk" });
const title: string = created.args.title;
// @ts-expect-error there is no such mutation
client.mutate("todo.crate", { id: "1", title });
// @ts-expect-error the title is missing
client.mutate("todo.create", { id: "1" });
// @ts-expect-error an id is a text
client.mutate("todo.delete", { id: 1 });
// @ts-expect-error the state is never changed in place
client.state.todos.push({ id: "1", title, completed: false });
const waiting: string[] = client.pending.map(({ args }) => args.id);

// @ts-expect-error the scope is missing
new SyncClient({ url: "/", initial: 0, apply: (state: number) => state });
// @ts-expect-error apply() returns another state than the initial one
new SyncClient<State>({ url: "/", scope: "demo", initial: { todos: [] }, apply: () => 1 });
// @ts-expect-error a queue is synchronous
new SyncClient({ url: "/", scope: "a", initial: 0, apply: Number, queue: indexedDBStorage() });

// Without types of the application's own everything is allowed.
const loose = new SyncClient({ url: new URL("/"), scope: "a", initial: 0, apply: (state) => state + 1 });
loose.mutate("anything", { at: ["all"] });
const sum: number = loose.state + 1;

// --- Events, and what an application waits for ----------------------------------------------

function onRefused({ detail }: CustomEvent<Refused<Mutations>>): string {
  const { mutation, code, error } = detail;
  if (mutation.name === "todo.create") return mutation.args.title;
  return `${code}: ${error}`;
}

client.addEventListener("refused", onRefused);
client.removeEventListener("refused", onRefused);
client.addEventListener("change", ({ type }) => type.length, { once: true });
client.addEventListener("step", ({ detail }: CustomEvent<Step<Data>>) => detail.changes?.[0]?.data.op);
// @ts-expect-error the event is called change
client.addEventListener("changed", () => {});
// @ts-expect-error a status event has no detail
client.addEventListener("status", ({ detail }) => detail);

function helpFor({ error, online, saved, waiting }: Status): string {
  switch (error?.action) {
    case "token":
      client.start("a new token");
      return "Log in again.";
    case "start":
    case "report":
      return error.message;
    case "wait":
    case undefined:
      return `${waiting} are waiting, ${online ? "online" : "offline"}, ${saved ? "" : "not "}saved`;
  }
}

export async function saveAndLogOut(): Promise<string> {
  await client.ready;
  await client.confirmed(created);
  await client.confirmed(created.id);
  client.stop();
  client.close();
  await client.forget();
  return helpFor(client.status) + title + waiting.join() + sum;
}

// --- Storages -------------------------------------------------------------------------------

const own: StateStorage = {
  load: (key) => JSON.parse(sessionStorage.getItem(key) ?? "null"),
  save: async (key, saved, tail) => {
    sessionStorage.setItem(key, JSON.stringify(saved));
    return tail && tail.changes.length > 1000 ? { ...saved, state: null } : saved;
  },
  remove: (key) => sessionStorage.removeItem(key),
};
const options = { url: "/", scope: "demo", initial: 0, apply: (state: number) => state };
for (const storage of [indexedDBStorage(), indexedDBStorage("mine"), webStorage(localStorage), own, null]) {
  new SyncClient({ ...options, storage, queue: sessionStorage, WebSocket: null, fetch });
}

// --- A React hook ---------------------------------------------------------------------------

const useSync = <T>(event: "change" | "status", read: () => T): T =>
  useSyncExternalStore((changed) => {
    client.addEventListener(event, changed);
    return () => client.removeEventListener(event, changed);
  }, read);

export function useTodos() {
  const { todos } = useSync("change", () => client.state);
  const pending = useSync("change", () => client.pending);
  const { loaded } = useSync("status", () => client.status);
  const [refused, setRefused] = useState<Refused<Mutations> | null>(null);
  useEffect(() => {
    const show = ({ detail }: CustomEvent<Refused<Mutations>>) => setRefused(detail);
    client.addEventListener("refused", show);
    client.start();
    return () => {
      client.removeEventListener("refused", show);
      client.stop();
    };
  }, []);
  return { todos, pending, loaded, refused, rename: (id: string, title: string) => client.mutate("todo.update", { id, title }) };
}
