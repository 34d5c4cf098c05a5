/** An amount in the smallest unit of the shop's currency: cents, pence, öre. Never a fraction. */
export class Money {
  static readonly zero = new Money(0);

  private constructor(readonly units: number) {}

  static of(units: number): Money {
    if (!Number.isSafeInteger(units)) {
      throw new RangeError(`an amount must be a whole number of units, not ${units}`);
    }
    return units === 0 ? Money.zero : new Money(units);
  }

  /** Reads "12.50", "12" or "€12.50"; anything else is an error, never a guess. 💶 */
  static parse(text: string): Money {
    const match = /^\D?(\d+)(?:\.(\d{2}))?$/.exec(text.trim());
    if (!match) {
      throw new RangeError(`not an amount: ${JSON.stringify(text)}`);
    }
    return Money.of(Number(match[1]) * 100 + Number(match[2] ?? "0"));
  }

  plus(other: Money): Money {
    return Money.of(this.units + other.units);
  }

  times(factor: number): Money {
    return Money.of(Math.round(this.units * factor));
  }

  percent(percent: number): Money {
    return this.times(percent / 100);
  }

  atLeast(other: Money): boolean {
    return this.units >= other.units;
  }

  atMost(other: Money): Money {
    return this.units <= other.units ? this : other;
  }

  toString(): string {
    const cents = String(this.units % 100).padStart(2, "0");
    return `€${Math.floor(this.units / 100)}.${cents}`;
  }
}

export function sum(amounts: readonly Money[]): Money {
  return amounts.reduce((total, amount) => total.plus(amount), Money.zero);
}
