// The demo's language: word problems of one or two steps with worked answers in a few styles.
// Knows texts only: no tokens, no model.
import type { Choices } from '../data/random.js';

type Operator = '+' | '-' | '*';

interface Step {
  readonly left: number;
  readonly operator: Operator;
  readonly right: number;
  readonly result: number;
}

/** A problem and how it is solved. The last step's result is the answer. */
export interface Problem {
  readonly question: string;
  readonly steps: readonly Step[];
  readonly name: string;
  readonly item: string;
}

const names = ['Tom', 'Ann', 'Ben', 'Eva', 'Max', 'Lea', 'Sam', 'Mia', 'Leo', 'Ida', 'Jan', 'Zoe'] as const;
const items = ['apples', 'pens', 'books', 'eggs', 'cards', 'coins', 'nuts', 'stamps', 'shells', 'plums'] as const;
const boxes = ['boxes', 'bags', 'jars', 'shelves'] as const;

/** What a template is filled with. */
interface Cast {
  readonly name: string;
  readonly other: string;
  readonly item: string;
  readonly box: string;
}

interface Draft {
  readonly question: string;
  readonly steps: readonly Step[];
}
type Template = (c: Choices, cast: Cast) => Draft;

const apply: Record<Operator, (a: number, b: number) => number> = {
  '+': (a, b) => a + b,
  '-': (a, b) => a - b,
  '*': (a, b) => a * b,
};

const step = (left: number, operator: Operator, right: number): Step => ({
  left,
  operator,
  right,
  result: apply[operator](left, right),
});

const templates: readonly Template[] = [
  (c, { name, item }) => {
    const s = step(c.integer(3, 89), '+', c.integer(3, 59));
    const how = c.pick(['buys', 'finds', 'gets']);
    return {
      question: `${name} has ${s.left} ${item} and ${how} ${s.right} more. How many ${item} does ${name} have?`,
      steps: [s],
    };
  },
  (c, { name, other, item }) => {
    const left = c.integer(20, 99);
    const s = step(left, '-', c.integer(3, left - 2));
    const how = c.pick([`gives ${s.right} to ${other}`, `loses ${s.right}`, `sells ${s.right}`]);
    return {
      question: `${name} has ${s.left} ${item} and ${how}. How many ${item} does ${name} have left?`,
      steps: [s],
    };
  },
  (c, { name, item, box }) => {
    const s = step(c.integer(2, 9), '*', c.integer(2, 12));
    return {
      question: `${name} has ${s.left} ${box} with ${s.right} ${item} in each. How many ${item} does ${name} have?`,
      steps: [s],
    };
  },
  (c, { name, other, item }) => {
    const first = step(c.integer(3, 69), '+', c.integer(3, 49));
    const second = step(first.result, '-', c.integer(2, first.result - 2));
    const how = c.pick([`gives ${second.right} to ${other}`, `loses ${second.right}`, `sells ${second.right}`]);
    return {
      question: `${name} has ${first.left} ${item}, buys ${first.right} more and ${how}. How many ${item} are left?`,
      steps: [first, second],
    };
  },
  (c, { name, item, box }) => {
    const first = step(c.integer(2, 9), '*', c.integer(2, 12));
    const second = step(first.result, '+', c.integer(2, 39));
    return {
      question: `${name} has ${first.left} ${box} with ${first.right} ${item} in each and ${second.right} more. How many ${item} does ${name} have?`,
      steps: [first, second],
    };
  },
  (c, { name, other, item }) => {
    const left = c.integer(5, 59);
    const more = c.pick([true, false]);
    const first = step(left, more ? '+' : '-', c.integer(2, more ? 39 : left - 2));
    const second = step(left, '+', first.result);
    return {
      question: `${name} has ${left} ${item}. ${other} has ${first.right} ${more ? 'more' : 'fewer'} than ${name}. How many ${item} do they have together?`,
      steps: [first, second],
    };
  },
];

/** Draws a problem. */
export function drawProblem(c: Choices): Problem {
  const name = c.pick(names);
  const other = c.pick(names.filter((n) => n !== name));
  const cast = { name, other, item: c.pick(items), box: c.pick(boxes) };
  return { ...c.pick(templates)(c, cast), name, item: cast.item };
}

const shown = ({ left, operator, right, result }: Step): string => `${left}${operator}${right}=${result}`;
const verbs: Record<Operator, string> = { '+': 'add', '-': 'subtract', '*': 'multiply' };

/** How an answer is worded; several are right for every problem, so no single text holds all of the probability. */
const styles: readonly ((p: Problem) => string)[] = [
  ({ steps }) => steps.map(shown).join(', '),
  ({ steps, item }) => `There are ${steps.map(shown).join(', then ')} ${item}`,
  ({ steps }) => `We ${steps.map((s) => `${verbs[s.operator]}: ${shown(s)}`).join(' and ')}`,
];

const answerOf = ({ steps }: Problem): number => steps[steps.length - 1].result;

/** The worked answer of a problem in one of the styles. */
export const wordAnswer = (p: Problem, style: number): string => `${styles[style](p)}. A: ${answerOf(p)}`;

/** A right answer in one of the styles. */
export const drawAnswer = (p: Problem, c: Choices): string => wordAnswer(p, c.integer(0, styles.length - 1));

/** All right answers. */
export const rightAnswers = (p: Problem): string[] => styles.map((_, style) => wordAnswer(p, style));

/** The number that an answer ends on; null where it has none. */
export function finalNumber(answer: string): number | null {
  const found = /\bA: (-?\d+)$/.exec(answer);
  return found ? Number(found[1]) : null;
}

/** Whether two answers end on the same number. */
export const agrees = (answer: string, right: string): boolean => {
  const number = finalNumber(answer);
  return number !== null && number === finalNumber(right);
};
