// Chat templates: finding them in a model folder and rendering conversations with the Jinja library.
// Renders what transformers renders; never tokenizes, never reads a clock unless the template itself does.

import { readdir } from 'node:fs/promises';
import { join } from 'node:path';
import { KeelgradError, show } from '../errors.js';
import { isRecord } from './fields.js';
import { readTextFileIfPresent } from './json-file.js';

/** One message; what else it holds (`tool_calls`, `name`, ...) goes to the template as it is. */
export interface ChatMessage {
  readonly role: string;
  readonly content?: unknown;
  readonly [field: string]: unknown;
}

export interface RenderOptions {
  /** Ends with the header under which the assistant answers. */
  addGenerationPrompt?: boolean;
  tools?: readonly unknown[];
  /** For templates that print a date (Llama 3): without it they print today's. */
  dateString?: string;
  /** Further variables of the template, a record's `chat_template_kwargs`. */
  variables?: Readonly<Record<string, unknown>>;
}

export interface ChatTemplate {
  /** The templates by name; a folder with one has it under `default`. */
  readonly sources: ReadonlyMap<string, string>;
  render(messages: readonly ChatMessage[], options?: RenderOptions): Promise<string>;
}

async function readNamedTemplates(folder: string): Promise<Map<string, string>> {
  const names = await readdir(folder).catch(() => []);
  const found = new Map<string, string>();
  for (const name of names.filter((entry) => entry.endsWith('.jinja')).sort()) {
    const text = await readTextFileIfPresent(join(folder, name));
    if (text !== undefined) found.set(name.slice(0, -'.jinja'.length), text);
  }
  return found;
}

function readConfigTemplates(value: unknown, source: string): Map<string, string> {
  if (value === undefined || value === null) return new Map();
  if (typeof value === 'string') return new Map([['default', value]]);
  const isNamed = (entry: unknown): entry is { name: string; template: string } =>
    isRecord(entry) && typeof entry.name === 'string' && typeof entry.template === 'string';
  if (Array.isArray(value) && value.every(isNamed)) return new Map(value.map(({ name, template }) => [name, template]));
  const expected = 'a template or a list of {name, template}';
  throw new KeelgradError(`${source}: chat_template: expected ${expected}, found ${show(value)}`);
}

/** All templates of a folder: files win over the `chat_template` of tokenizer_config.json. */
export async function findChatTemplates(folder: string, tokenizerConfig: unknown): Promise<Map<string, string>> {
  const field = isRecord(tokenizerConfig) ? tokenizerConfig.chat_template : undefined;
  const templates = readConfigTemplates(field, join(folder, 'tokenizer_config.json'));
  const file = await readTextFileIfPresent(join(folder, 'chat_template.jinja'));
  if (file !== undefined) templates.set('default', file);
  const named = await readNamedTemplates(join(folder, 'additional_chat_templates'));
  return new Map([...templates, ...named]);
}

/** transformers' choice: `tool_use` for conversations with tools, where there is one, `default` otherwise. */
function chooseTemplate(sources: ReadonlyMap<string, string>, hasTools: boolean, origin: string): string {
  const name = hasTools && sources.has('tool_use') ? 'tool_use' : 'default';
  const source = sources.get(name);
  if (source !== undefined) return source;
  const names = [...sources.keys()].join(', ');
  throw new KeelgradError(`${origin}: expected a chat template named default, found ${names}`);
}

type Compiled = { render(variables: Record<string, unknown>): string };

/** `origin` names the model in messages; `specialTokens` (`bos_token`, ...) are variables of every template. */
export function createChatTemplate(
  sources: ReadonlyMap<string, string>,
  specialTokens: Readonly<Record<string, string>>,
  origin: string,
): ChatTemplate {
  const compiled = new Map<string, Compiled>();
  const compile = async (source: string): Promise<Compiled> => {
    const { Template } = await import('@huggingface/jinja');
    const template = compiled.get(source) ?? new Template(source);
    compiled.set(source, template);
    return template;
  };
  const render = async (messages: readonly ChatMessage[], options: RenderOptions = {}): Promise<string> => {
    const { addGenerationPrompt = false, tools, dateString, variables } = options;
    const date = dateString === undefined ? {} : { date_string: dateString };
    const given = { messages, tools: tools ?? null, documents: null, add_generation_prompt: addGenerationPrompt };
    try {
      const template = await compile(chooseTemplate(sources, tools !== undefined, origin));
      return template.render({ ...specialTokens, ...date, ...variables, ...given });
    } catch (error) {
      if (error instanceof KeelgradError) throw error;
      const reason = (error as Error).message;
      throw new KeelgradError(`${origin}: the chat template does not accept these messages: ${reason}`, {
        cause: error,
      });
    }
  };
  return { sources, render };
}
