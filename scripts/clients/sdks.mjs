// What Node clients do with a server: run by scripts/clients.py in a folder of their own (.node-clients).
// Prints one JSON object per check: {"client", "version", "check", "ok", "detail"}, as sdks.py does.
import { readFileSync } from "node:fs";
import Anthropic from "@anthropic-ai/sdk";
import OpenAI from "openai";
import { createAnthropic } from "@ai-sdk/anthropic";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, jsonSchema, streamText, tool } from "ai";

const { CLIENTS_URL: URL_, CLIENTS_LOST_URL: LOST, CLIENTS_MODEL: MODEL, CLIENTS_CALL_REGEX: REGEX } = process.env;
const CHECKS = process.env.CLIENTS_CHECKS?.split(",");
const FORMAT = JSON.parse(process.env.CLIENTS_CALL_SCHEMA);
const KEY = "sk-dummy";
const ASK = "def add(a, b):";
const MESSAGES = [{ role: "user", content: ASK }];
const PARAMETERS = {
  type: "object",
  properties: { path: { type: "string" }, count: { type: "integer" } },
  required: ["path", "count"],
};
const FORCED = { structured_outputs: { regex: REGEX } };
const BY_SCHEMA = { output_config: { format: FORMAT } };
const FEW = 24;
const MANY = 160;

function expect(holds, what) {
  if (!holds) throw new Error(`expected ${what}`);
}

function expectCall(name, given) {
  const got = typeof given === "string" ? JSON.parse(given) : given;
  expect(name === "read", `a call of read, got ${name}`);
  expect(typeof got?.path === "string" && Number.isInteger(got?.count), `path and count, got ${JSON.stringify(got)}`);
  return `read(${JSON.stringify(got)})`;
}

async function refused(status, call) {
  let got;
  try {
    await call();
  } catch (error) {
    got = error;
  }
  expect(got !== undefined, "an error, got an answer");
  const seen = got.status ?? got.statusCode ?? got.lastError?.statusCode;
  expect(seen === status, `status ${status}, got ${seen}: ${got}`);
  return `${got.constructor.name} ${seen}: ${got.message.slice(0, 90)}`;
}

// The stream of an engine that is lost must end in an error, not as if it were complete.
async function lost(open, failed = () => false) {
  let seen = 0;
  try {
    for await (const event of await open()) {
      if (failed(event)) throw new Error(`the event ${event.type}: ${JSON.stringify(event.error ?? event.response?.error ?? "")}`);
      seen += 1;
    }
  } catch (error) {
    expect(seen > 0, `events before the error, got none and ${error}`);
    return `${error.constructor.name} after ${seen} events: ${String(error.message).slice(0, 80)}`;
  }
  throw new Error(`expected an error, got a normal end after ${seen} events`);
}

function version(name) {
  return JSON.parse(readFileSync(`node_modules/${name}/package.json`)).version;
}

async function collect(stream) {
  const events = [];
  for await (const event of stream) events.push(event);
  return events;
}

function openaiChecks() {
  const [client, broken] = [URL_, LOST].map((base) => new OpenAI({ baseURL: `${base}/v1`, apiKey: KEY, maxRetries: 0 }));
  const chat = { model: MODEL, messages: MESSAGES, temperature: 0, max_tokens: FEW };
  const chatTool = { type: "function", function: { name: "read", description: "Reads a file", parameters: PARAMETERS } };
  const call = { ...chat, max_tokens: MANY, tools: [chatTool], ...FORCED };
  const respond = { model: MODEL, input: ASK, temperature: 0, max_output_tokens: FEW, store: false };
  const respondTool = { type: "function", name: "read", description: "Reads a file", parameters: PARAMETERS };
  const respondCall = { ...respond, max_output_tokens: MANY, tools: [respondTool], ...FORCED };
  const create = (body) => client.chat.completions.create(body);
  return {
    "openai (chat)": {
      models: async () => {
        const names = (await collect(client.models.list())).map((model) => model.id);
        expect(names.includes(MODEL), `${MODEL} in the list, got ${names}`);
        return String(names);
      },
      plain: async () => {
        const text = (await create(chat)).choices[0].message.content;
        expect(text, "text, got none");
        return JSON.stringify(text.slice(0, 30));
      },
      streamed: async () => {
        const response = await create(chat);
        const whole = response.choices[0].message.content;
        const events = await collect(await create({ ...chat, stream: true, stream_options: { include_usage: true } }));
        const parts = events.filter((event) => event.choices.length).map((event) => event.choices[0].delta.content ?? "");
        expect(parts.join("") === whole && parts.length > 2, `${whole} in pieces, got ${parts}`);
        const wanted = response.usage.completion_tokens;
        const { completion_tokens: said } = events.at(-1).usage;
        expect(said > 0 && said === wanted && said <= FEW, `usage of ${wanted} tokens in the last event, got ${said}`);
        return `${events.length} events`;
      },
      "tool call": async () => {
        const choice = (await create(call)).choices[0];
        expect(choice.finish_reason === "tool_calls", `finish_reason tool_calls, got ${choice.finish_reason}`);
        const made = choice.message.tool_calls[0].function;
        const whole = expectCall(made.name, made.arguments);
        const final = await client.chat.completions.stream(call).finalChatCompletion();
        const streamed = final.choices[0].message.tool_calls[0].function;
        expect(expectCall(streamed.name, streamed.arguments) === whole, `${whole}, got ${JSON.stringify(streamed)}`);
        return whole;
      },
      thinking: async () => {
        const more = { chat_template_kwargs: { enable_thinking: true }, thinking_token_budget: 8 };
        const { message } = (await create({ ...chat, ...more })).choices[0];
        expect(message.reasoning, "thoughts, got none");
        return JSON.stringify(message.reasoning.slice(0, 30));
      },
      "unknown model": () => refused(404, () => create({ ...chat, model: "other" })),
      "bad parameter": () => refused(400, () => create({ ...chat, temperature: 99 })),
      "engine lost": () => lost(() => broken.chat.completions.create({ ...chat, max_tokens: MANY, stream: true })),
    },
    "openai (responses)": {
      plain: async () => {
        const response = await client.responses.create(respond);
        expect(response.output_text, "text, got none");
        return `${response.status}, ${JSON.stringify(response.output_text.slice(0, 30))}`;
      },
      streamed: async () => {
        const whole = (await client.responses.create(respond)).output_text;
        const events = await collect(await client.responses.create({ ...respond, stream: true }));
        const text = events.filter((event) => event.type === "response.output_text.delta").map((event) => event.delta).join("");
        expect(text === whole, `${whole}, got ${text}`);
        expect(/^response\.(completed|incomplete)$/.test(events.at(-1).type), `an end, got ${events.at(-1).type}`);
        return `${events.length} events, the last ${events.at(-1).type}`;
      },
      "tool call": async () => {
        const made = (await client.responses.create(respondCall)).output.find((item) => item.type === "function_call");
        expect(made, "a function_call, got none");
        const whole = expectCall(made.name, made.arguments);
        const final = await client.responses.stream(respondCall).finalResponse();
        const streamed = final.output.find((item) => item.type === "function_call");
        expect(streamed && expectCall(streamed.name, streamed.arguments) === whole, `${whole}, got ${JSON.stringify(final.output)}`);
        return whole;
      },
      "unknown model": () => refused(404, () => client.responses.create({ ...respond, model: "other" })),
      "bad parameter": () => refused(400, () => client.responses.create({ ...respond, temperature: 99 })),
      "engine lost": () =>
        lost(
          () => broken.responses.create({ ...respond, max_output_tokens: MANY, stream: true }),
          (event) => event.type === "error" || event.type === "response.failed",
        ),
    },
  };
}

function anthropicChecks() {
  const [client, broken] = [URL_, LOST].map((base) => new Anthropic({ baseURL: base, apiKey: KEY, maxRetries: 0 }));
  const usual = { model: MODEL, messages: MESSAGES, temperature: 0, max_tokens: FEW };
  const read = { name: "read", description: "Reads a file", input_schema: PARAMETERS };
  const call = { ...usual, max_tokens: MANY, tools: [read], ...BY_SCHEMA };
  const create = (body) => client.messages.create(body);
  return {
    anthropic: {
      models: async () => {
        const names = (await collect(client.models.list())).map((model) => model.id);
        expect(names.includes(MODEL), `${MODEL} in the list, got ${names}`);
        return String(names);
      },
      plain: async () => {
        const message = await create(usual);
        expect(message.content[0].text, "text, got none");
        return JSON.stringify(message.content[0].text.slice(0, 30));
      },
      streamed: async () => {
        const whole = (await create(usual)).content[0].text;
        const final = await client.messages.stream(usual).finalMessage();
        expect(final.content[0].text === whole, `${whole}, got ${JSON.stringify(final.content)}`);
        return `${whole.length} characters`;
      },
      "tool call": async () => {
        const message = await create(call);
        const used = message.content.find((block) => block.type === "tool_use");
        expect(used && message.stop_reason === "tool_use", `tool_use, got ${JSON.stringify(message)}`);
        const whole = expectCall(used.name, used.input);
        const final = await client.messages.stream(call).finalMessage();
        const streamed = final.content.find((block) => block.type === "tool_use");
        expect(streamed && expectCall(streamed.name, streamed.input) === whole, `${whole}, got ${JSON.stringify(final.content)}`);
        return whole;
      },
      count_tokens: async () => {
        const counted = await client.messages.countTokens({ model: MODEL, messages: MESSAGES, tools: [read] });
        return String(counted.input_tokens);
      },
      "unknown model": () => refused(404, () => create({ ...usual, model: "other" })),
      "bad parameter": () => refused(400, () => create({ ...usual, temperature: 99 })),
      "engine lost": () => lost(() => broken.messages.create({ ...usual, max_tokens: MANY, stream: true })),
    },
  };
}

// The AI SDK has no way to pass a vLLM field to each of its providers: it goes into the body on the way.
function adding(more) {
  return (url, init) => fetch(url, { ...init, body: init?.body ? JSON.stringify({ ...JSON.parse(init.body), ...more }) : undefined });
}

function aiSdkChecks(make, more) {
  const usual = { prompt: ASK, temperature: 0, maxOutputTokens: FEW, maxRetries: 0 };
  const tools = { read: tool({ description: "Reads a file", inputSchema: jsonSchema(PARAMETERS) }) };
  const call = () => ({ ...usual, maxOutputTokens: MANY, tools, model: make(URL_, adding(more))(MODEL) });
  const ask = (model, options) => generateText({ ...usual, ...options, model: make(URL_)(model) });
  const failed = (event) => event.type === "error";
  return {
    plain: async () => {
      const { text } = await ask(MODEL);
      expect(text, "text, got none");
      return JSON.stringify(text.slice(0, 30));
    },
    streamed: async () => {
      const whole = (await ask(MODEL)).text;
      const parts = await collect(streamText({ ...usual, model: make(URL_)(MODEL) }).textStream);
      expect(parts.join("") === whole && parts.length > 2, `${whole} in pieces, got ${JSON.stringify(parts)}`);
      return `${parts.length} pieces`;
    },
    "tool call": async () => {
      const [made] = (await generateText(call())).toolCalls;
      expect(made, "a tool call, got none");
      const whole = expectCall(made.toolName, made.input);
      const [streamed] = await streamText(call()).toolCalls;
      expect(streamed && expectCall(streamed.toolName, streamed.input) === whole, `${whole}, got ${JSON.stringify(streamed)}`);
      return whole;
    },
    "unknown model": () => refused(404, () => ask("other")),
    "bad parameter": () => refused(400, () => ask(MODEL, { topP: 99 })),
    "engine lost": () =>
      lost(
        async () => streamText({ ...usual, maxOutputTokens: MANY, model: make(LOST)(MODEL), onError() {} }).stream,
        failed,
      ),
  };
}

const chat = (base, custom) => createOpenAI({ baseURL: `${base}/v1`, apiKey: KEY, fetch: custom }).chat;
const responses = (base, custom) => createOpenAI({ baseURL: `${base}/v1`, apiKey: KEY, fetch: custom }).responses;
const compatible = (base, custom) =>
  createOpenAICompatible({ name: "laguna", baseURL: `${base}/v1`, apiKey: KEY, fetch: custom });
const claude = (base, custom) => createAnthropic({ baseURL: `${base}/v1`, apiKey: KEY, fetch: custom });
const clients = [
  ...Object.entries(openaiChecks()).map(([name, checks]) => [name, "openai", checks]),
  ...Object.entries(anthropicChecks()).map(([name, checks]) => [name, "@anthropic-ai/sdk", checks]),
  ["@ai-sdk/openai (chat)", "@ai-sdk/openai", aiSdkChecks(chat, FORCED)],
  ["@ai-sdk/openai (responses)", "@ai-sdk/openai", aiSdkChecks(responses, FORCED)],
  ["@ai-sdk/openai-compatible", "@ai-sdk/openai-compatible", aiSdkChecks(compatible, FORCED)],
  ["@ai-sdk/anthropic", "@ai-sdk/anthropic", aiSdkChecks(claude, BY_SCHEMA)],
];
for (const [client, name, checks] of clients) {
  for (const [check, run] of Object.entries(checks)) {
    if (CHECKS && !CHECKS.includes(check)) continue;
    let ok = true;
    let detail;
    try {
      detail = await run();
    } catch (error) {
      ok = false;
      detail = `${error.constructor.name}: ${error.message}`;
    }
    console.log(JSON.stringify({ client: `${client}, Node`, version: version(name), check, ok, detail: detail.slice(0, 300) }));
  }
}
