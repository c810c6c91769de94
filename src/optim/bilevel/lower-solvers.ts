// The names of the lower level's solvers. Data only, imported by the option table as well: nothing that loads the addon.

/** How the lower level steps: plain gradient descent has no state; momentum and Adam cost theirs while the level runs. */
export const lowerSolvers = ['gradient', 'momentum', 'adam'] as const;
export type LowerSolver = (typeof lowerSolvers)[number];
