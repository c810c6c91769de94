// The ways to the regularizer's gradient, by name. Data only, imported by the option table as well: nothing that loads the addon.

export const regularizerMethods = ['exact', 'finite-differences'] as const;
export type RegularizerMethod = (typeof regularizerMethods)[number];
