import { Money, sum } from "./money";

/** What a shop sells; prices are in the smallest unit of the currency. */
export interface Product {
  id: string;
  title: string;
  price: Money;
  weightGrams: number;
  tags: readonly string[];
}

export interface Line {
  product: Product;
  quantity: number;
}

export type Discount =
  | { kind: "percent"; percent: number; tag?: string }
  | { kind: "fixed"; amount: Money; minimum: Money }
  | { kind: "free-shipping"; minimum: Money };

export interface ShippingRate {
  country: string;
  upToGrams: number;
  price: Money;
}

export class CartError extends Error {
  constructor(
    message: string,
    readonly productId?: string,
  ) {
    super(message);
    this.name = "CartError";
  }
}

const MAX_QUANTITY = 99;

/**
 * A shopping cart. Every change returns a new cart, so a view can compare two of them by identity
 * and an undo stack is a list of carts.
 */
export class Cart {
  private constructor(
    readonly lines: readonly Line[],
    readonly discounts: readonly Discount[],
    readonly country: string,
  ) {}

  static empty(country: string): Cart {
    return new Cart([], [], country);
  }

  /** Adds to the quantity when the product is in the cart already. */
  add(product: Product, quantity = 1): Cart {
    if (!Number.isInteger(quantity) || quantity < 1) {
      throw new CartError(`quantity must be a whole number above 0, not ${quantity}`, product.id);
    }
    const known = this.lines.find((line) => line.product.id === product.id);
    const total = quantity + (known?.quantity ?? 0);
    if (total > MAX_QUANTITY) {
      throw new CartError(`at most ${MAX_QUANTITY} of one product can be ordered`, product.id);
    }
    const lines = known
      ? this.lines.map((line) => (line === known ? { ...line, quantity: total } : line))
      : [...this.lines, { product, quantity }];
    return new Cart(lines, this.discounts, this.country);
  }

  remove(productId: string): Cart {
    const lines = this.lines.filter((line) => line.product.id !== productId);
    if (lines.length === this.lines.length) {
      throw new CartError("the product is not in the cart", productId);
    }
    return new Cart(lines, this.discounts, this.country);
  }

  apply(discount: Discount): Cart {
    if (discount.kind === "percent" && (discount.percent <= 0 || discount.percent > 100)) {
      throw new CartError(`a discount of ${discount.percent} % makes no sense`);
    }
    return new Cart(this.lines, [...this.discounts, discount], this.country);
  }

  get subtotal(): Money {
    return sum(this.lines.map((line) => line.product.price.times(line.quantity)));
  }

  get weightGrams(): number {
    return this.lines.reduce((grams, line) => grams + line.product.weightGrams * line.quantity, 0);
  }

  /** What the discounts take off the goods; never more than they cost. */
  get reduction(): Money {
    let reduction = Money.zero;
    for (const discount of this.discounts) {
      switch (discount.kind) {
        case "percent": {
          const lines = this.lines.filter((line) => !discount.tag || line.product.tags.includes(discount.tag));
          const base = sum(lines.map((line) => line.product.price.times(line.quantity)));
          reduction = reduction.plus(base.percent(discount.percent));
          break;
        }
        case "fixed":
          if (this.subtotal.atLeast(discount.minimum)) {
            reduction = reduction.plus(discount.amount);
          }
          break;
        case "free-shipping":
          break;
      }
    }
    return reduction.atMost(this.subtotal);
  }

  shipping(rates: readonly ShippingRate[]): Money {
    const free = this.discounts.some(
      (discount) => discount.kind === "free-shipping" && this.subtotal.atLeast(discount.minimum),
    );
    if (free || this.lines.length === 0) {
      return Money.zero;
    }
    const rate = rates
      .filter((candidate) => candidate.country === this.country && candidate.upToGrams >= this.weightGrams)
      .sort((a, b) => a.upToGrams - b.upToGrams)[0];
    if (!rate) {
      throw new CartError(`no shipping to ${this.country} for ${this.weightGrams} g`);
    }
    return rate.price;
  }

}
